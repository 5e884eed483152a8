# SPDX-License-Identifier: Apache-2.0
"""What figures depend on besides the settings: contents of images, what is ranked, versions, device."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress

import torch

from fastreid_u.data import Sample
from fastreid_u.engine.arguments import package_version
from fastreid_u.engine.datasets import Datasets
from fastreid_u.engine.evaluate import Split
from fastreid_u.engine.own_file import read_own

_IMAGES, _BYTES = 256, 65536  # of so many images of a set, spread over it, so many bytes are looked at


def surroundings(datasets: Datasets, split: Split | None, device: torch.device) -> dict[str, str]:
    """What is compared, as text by name. Reads up to 16 MB of images of each set."""
    return {
        "contents": _contents(datasets),
        "ranked": _ranked(split, datasets.target.root),
        "fastreid_u": package_version(),
        "torch": torch.__version__,
        "device": device.type,
    }


def _contents(datasets: Datasets) -> str:
    """A digest of the training images of each set."""
    digest = hashlib.sha256()
    for reid in (datasets.target, datasets.source):
        _add_bytes(digest, reid.train if reid else ())
    return digest.hexdigest()


def _add_bytes(digest: "hashlib._Hash", samples: Sequence[Sample]) -> None:
    """Feed ``digest`` the first bytes of some images, spread over the ``samples``; of all where they are few."""
    for sample in samples[:: -(-len(samples) // _IMAGES) or 1]:
        with suppress(OSError, ValueError):  # the loader reports what cannot be read
            digest.update(read_own(sample.path, "train", _BYTES))
        digest.update(b"\n")


def _ranked(split: Split | None, root: str | os.PathLike) -> str:
    """A digest of the images that are ranked: paths below the root, identities, cameras, which are queries; bytes."""
    digest = hashlib.sha256(f"{split and split.queries}\n".encode())
    _add_bytes(digest, split.samples if split else ())
    for sample in split.samples if split else ():
        name = os.path.relpath(sample.path, root)
        digest.update(f"{name}\0{sample.pid}\0{sample.camid}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()

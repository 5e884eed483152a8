# SPDX-License-Identifier: Apache-2.0
"""The data sets of a training: found, read, checked against each other, and described to the recipe."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u.engine.arguments import Experiment
from fastreid_u.engine.display import Display, Phase
from fastreid_u.recipe import Images

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset


@dataclass(frozen=True)
class Datasets:
    """The set to learn, and the labelled set of a method that learns from one as well.

    Attributes:
        target: its training images are learned; its query and gallery, if any, are ranked.
        source: the labelled set, or None; its training images all have an identity.
        fingerprint: of both sets' training images, as ``fingerprint`` makes it.
    """

    target: "ReIDDataset"
    source: "ReIDDataset | None"
    fingerprint: str

    def images(self) -> Images:
        """What a recipe may know of the target, and of the source with its identities."""
        images = _images(self.target)
        images.source = _images(self.source, identities=True) if self.source else None
        return images


def load_datasets(experiment: Experiment, display: Display) -> Datasets:
    """Read the sets of ``experiment``; progress of rendering goes to ``display``.

    Raises:
        ValueError: a set has no images to train on, or both are the same. FileNotFoundError: a set is not there.
    """
    from fastreid_u.data import ReIDDataset
    from fastreid_u.data.same_file import shared_files, with_leak_noted, with_shared_files_noted

    target = experiment.dataset
    if isinstance(target, ReIDDataset):
        target = with_shared_files_noted(target)
    else:
        target = _load(target, experiment.root, experiment.data, display)
    if not target.train:
        raise ValueError(f"train: dataset must hold training images, got none in {target.root}")
    source = _load_source(experiment, display)
    if source is not None and shared_files(target.train, source.train):
        raise ValueError(f"train: source must hold other images than the set to learn, got {target.root} for both")
    if source is not None:
        target = with_leak_noted(target, "labelled source", source.train)
    return Datasets(target, source, fingerprint(target, source))


def fingerprint(*sets: "ReIDDataset | None") -> str:
    """A digest of the training images: their paths below the root, sizes in bytes, identities and cameras."""
    digest = hashlib.sha256()
    for reid in sets:
        for sample in reid.train if reid else ():
            try:
                size = os.stat(sample.path).st_size
            except OSError:
                size = -1  # not readable now; the loader reports it when it reads the image
            name = os.path.relpath(sample.path, reid.root)
            digest.update(f"{name}\0{size}\0{sample.pid}\0{sample.camid}\n".encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def _load(
    dataset: str | os.PathLike, root: str | os.PathLike | None, data: Mapping[str, Any], display: Display
) -> "ReIDDataset":
    from fastreid_u.data import load_dataset

    with ExitStack() as stack:
        phase: Phase | None = None

        def progress(done: int, total: int) -> None:
            nonlocal phase
            if phase is None:
                display.line(f"rendering {total:,} images, once for these dials")
                phase = stack.enter_context(display.phase("render", total))
            phase(done - phase.done)

        return load_dataset(dataset, root, progress=progress, **data)


def _load_source(experiment: Experiment, display: Display) -> "ReIDDataset | None":
    """The labelled set of a method that uses one, without images whose identity is unknown."""
    method = experiment.recipe_class
    if not hasattr(experiment.config, "source"):
        if experiment.source_data:
            raise ValueError(
                f"train: source_data must be left out for method {method.name!r}, got {dict(experiment.source_data)}"
            )
        return None
    name = experiment.config.source
    if name is None:
        raise ValueError(f"train: source must name a labelled set for method {method.name!r}, got None")
    reid = _load(name, experiment.source_root, experiment.source_data, display)
    named = tuple(sample for sample in reid.train if sample.pid >= 0) if reid.has_pids else ()
    if not named:
        raise ValueError(f"train: source must have training images with identities, got none in {reid.root}")
    return dataclasses.replace(reid, train=named)


def _images(reid: "ReIDDataset", *, identities: bool = False) -> Images:
    """Identities, of a source only, are numbered 0 .. P - 1 in their own order."""
    camids = torch.tensor([s.camid for s in reid.train]) if reid.has_train_cameras else None
    pids = torch.tensor([s.pid for s in reid.train]).unique(return_inverse=True)[1] if identities else None
    return Images(len(reid.train), camids, pids)

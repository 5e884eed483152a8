# SPDX-License-Identifier: Apache-2.0
"""A trained network gives features of any images."""

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastreid_u._default_device import on_cpu
from fastreid_u.engine.device import Machine, pick_device, uses_bfloat16
from fastreid_u.engine.display import Display
from fastreid_u.engine.image_set import ImageSet
from fastreid_u.trained.model import load_model, reading_of

if TYPE_CHECKING:
    from fastreid_u.data import Sample


class Extracted(NamedTuple):
    """Features of images, in the order of ``paths``; rows of unreadable images are NaN and named in ``bad``."""

    features: Tensor
    paths: list[str]
    bad: dict[str, str]


@on_cpu()
def extract(
    run: str | os.PathLike,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    which: str = "last",
    batch_size: int | None = None,
    workers: int = 4,
    worker_start: str | None = None,
    truncated_images: bool | None = None,
    device: str | torch.device | None = None,
    quiet: bool = True,
) -> Extracted:
    """Unit features of images, in the precision that the network was trained in.

    Args:
        run: run folder or model file.
        images: a folder (every image below it, sorted by path, whatever its sub-folders are called), an image file, a
            CSV file or the name of a known set (train, query and gallery in turn, without junk), or a list of files.
        batch_size: images per batch, default the run's own; changes speed, and features in the last bits.
        truncated_images: use images whose file ends early, as far as they go; default as in training.
        which, workers, worker_start, device, quiet: as for ``train`` and ``load_model``.

    Returns:
        ``Extracted``: features (N, D) float32 on ``device``, the N paths in the same order, and unreadable images.

    Raises:
        ValueError: no image, or none that can be read.
        FileNotFoundError: no such run or images.
    """
    device = pick_device("extract", device)
    samples, notes = _samples(images)
    if not samples:
        raise ValueError(f"extract: images must name at least one file, got none in {images!r}")
    model, about = load_model(run, which=which, device=device)
    config = about["config"]
    display = Display(quiet=quiet)
    for note in notes:
        display.line(f"note: {note}")
    machine = Machine(device, uses_bfloat16(config["amp"], device), display)
    reading = reading_of(
        config, batch_size=batch_size, workers=workers, worker_start=worker_start, truncated=truncated_images
    )
    wanted = ImageSet(samples, reading, machine, bad_share=1.0)
    with closing(wanted), display.hearing_warnings():
        features = wanted.features(model)
    return Extracted(features, [sample.path for sample in samples], wanted.bad.reasons)


def _samples(images: str | os.PathLike | Sequence[str | os.PathLike]) -> "tuple[tuple[Sample, ...], Sequence[str]]":
    """What ``images`` names, and notes. A folder is not read as a data set, which leaves out images in no split."""
    from fastreid_u.data import Sample, known_name, load_dataset
    from fastreid_u.data.catalogue import data_root
    from fastreid_u.data.locate import IMAGE_SUFFIXES, list_files

    notes: Sequence[str] = ()
    if isinstance(images, str | os.PathLike):
        path = Path(images).expanduser()
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            images = [path]
        elif known_name(images) is None and os.fspath(images):
            folder = next((place for place in (path, data_root(None) / path) if place.is_dir()), None)
            if folder is not None:
                files = list_files(folder, recursive=True)
                images, notes = files.images, files.notes("folder")
    if isinstance(images, str | os.PathLike):
        reid = load_dataset(os.fspath(images))
        return reid.train + reid.query + reid.gallery, reid.notes
    if not isinstance(images, Iterable):
        raise TypeError(f"extract: images must be a folder, a CSV file, a known set or a list of files, got {images!r}")
    return tuple(Sample(os.fspath(path), -1, 0) for path in images), notes

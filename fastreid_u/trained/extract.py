# SPDX-License-Identifier: Apache-2.0
"""A trained network gives features of any images."""

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastreid_u._default_device import on_cpu
from fastreid_u.engine.device import Machine, pick_device, uses_bfloat16
from fastreid_u.engine.display import Display
from fastreid_u.engine.image_set import ImageSet
from fastreid_u.trained.crops import lies_in_memory, listed, rgb_image
from fastreid_u.trained.model import Choice, network_and_config, reading_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastreid_u.data import Sample


class Extracted(NamedTuple):
    """Features of images, in the order of ``paths``; rows of unreadable images are NaN and named in ``bad``."""

    features: Tensor
    paths: list[str]
    bad: dict[str, str]


@on_cpu()
def extract(
    run: str | os.PathLike | None,
    images: Any,
    *,
    arch: str | None = None,
    which: str = "last",
    amp: str | None = None,
    batch_size: int | None = None,
    workers: int = 4,
    worker_start: str | None = None,
    truncated_images: bool | None = None,
    device: str | torch.device | None = None,
    quiet: bool = True,
    **settings: Any,
) -> Extracted:
    """Unit features of images, in the precision that the network was trained in.

    Args:
        run: run folder or model file; with ``arch``, what ``train`` takes as ``weights``.
        arch: a network without a run: the name that ``train`` takes.
        images: a folder (every image below it, sorted by path, whatever its sub-folders are called), an image file, a
            CSV file or the name of a known set (train, query and gallery in turn, without junk), or a list of files. Or
            crops in memory, one or a list, also mixed with files: uint8 arrays (H, W, 3) or tensors (3, H, W) in the
            order red, green, blue, grey ones (H, W), batches of one size, PIL images. They give the bits that a
            lossless file of them gives, are called "images[0]", ... in ``paths``, and take 3 * height * width bytes
            each; one process reads the files beside them.
        amp: "off", "bf16" or "auto" in place of the run's own. In bfloat16 features differ in the third digit.
        batch_size: images per batch, default the run's own; changes speed, and features in the last bits.
        truncated_images: use images whose file ends early, as far as they go; default as in training.
        which, workers, worker_start, device, quiet: as for ``train`` and ``load_model``.
        **settings: with ``arch``, the settings of ``train`` that the network and its images have: height, width,
            pooling_type, stem_relu, pixel_norm, channels_last.

    Returns:
        ``Extracted``: features (N, D) float32 on ``device``, the N paths in the same order, and unreadable images.

    Raises:
        ValueError: no image, or none that can be read, or a crop of another shape.
        TypeError: a crop of another dtype than uint8.
        FileNotFoundError: no such run or images.
    """
    device = pick_device("extract", device)
    samples, notes, crops = _samples(images)
    if not samples:
        raise ValueError(f"extract: images must name at least one file, got none in {images!r}")
    model, config = network_and_config("extract", run, Choice(arch, settings, which, amp), device)
    display = Display(quiet=quiet)
    for note in notes:
        display.line(f"note: {note}")
    machine = Machine(device, uses_bfloat16(config["amp"], device), display)
    workers = 0 if crops else workers
    reading = reading_of(
        config, device, batch_size=batch_size, workers=workers, worker_start=worker_start, truncated=truncated_images
    )
    wanted = ImageSet(samples, replace(reading, cache=bool(crops)), machine, bad_share=1.0)
    for number, crop in crops.items():
        wanted.plain.cache.put(number, crop)
    with closing(wanted), display.hearing_warnings():
        features = wanted.features(model)
    return Extracted(features, [sample.path for sample in samples], wanted.bad.reasons)


def _samples(images: Any) -> "tuple[tuple[Sample, ...], Sequence[str], dict[int, Image]]":
    """What ``images`` names, notes, and the images that lie in memory, by their number.

    A folder is not read as a data set, which leaves out images in no split.
    """
    from fastreid_u.data import Sample, known_name, load_dataset
    from fastreid_u.data.catalogue import data_root
    from fastreid_u.data.locate import IMAGE_SUFFIXES, list_files

    notes: Sequence[str] = ()
    images = listed(images)
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
        return reid.train + reid.query + reid.gallery, reid.notes, {}
    if not isinstance(images, Iterable):
        raise TypeError(f"extract: images must be a folder, a CSV file, a known set, or files or crops, got {images!r}")
    samples, crops = [], {}
    for number, item in enumerate(images):
        name = f"images[{number}]"
        if lies_in_memory(item):
            crops[number] = rgb_image(item, name)
        elif not isinstance(item, str | os.PathLike):
            raise TypeError(f"extract: {name} must be a path, an array, a tensor or a PIL image, got {item!r}")
        samples.append(Sample(name if number in crops else os.fspath(item), -1, 0))
    return tuple(samples), notes, crops

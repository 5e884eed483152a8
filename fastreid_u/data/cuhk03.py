# SPDX-License-Identifier: Apache-2.0
"""CUHK03 with the 767/700 split: torchreid's extracted images and JSON split, or folders with Market-1501 names.

The original ``cuhk-03.mat`` is not read: every code base extracts it first, and torchreid's result is what people
have. Boxes come twice, from a detector and drawn by hand; the two are separate benchmarks.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from fastreid_u.data.dataset import ReIDDataset, Sample, relabel, sort_samples
from fastreid_u.data.locate import DatasetNotFound, shown
from fastreid_u.data.market import MARKET_FOLDERS, one_based, read_market_like

_VARIANTS = ("detected", "labeled")

CUHK03_LAYOUTS = (
    *((f"splits_new_{variant}.json", f"images_{variant}") for variant in _VARIANTS),
    *(tuple(f"{variant}/{part}" for part in MARKET_FOLDERS) for variant in _VARIANTS),
    MARKET_FOLDERS,
)


def read_cuhk03(folder: Path, *, variant: str | None = None) -> ReIDDataset:
    """Read ``folder``, whose layout is one of ``CUHK03_LAYOUTS``.

    Args:
        folder: holds ``splits_new_<variant>.json`` and ``images_<variant>/``, or ``<variant>/bounding_box_train`` and
            so on, or the three Market-1501 folders themselves.
        variant: "detected" or "labeled" boxes; default: detected if they are there.

    Raises:
        ValueError: an unknown variant, a split file of another form, or a split without images.
        DatasetNotFound: the variant, or an image that the split names, is not there.
    """
    if variant not in (None, *_VARIANTS):
        raise ValueError(f'cuhk03: variant must be "detected" or "labeled", got {variant!r}')
    for candidate in _VARIANTS if variant is None else (variant,):
        note = f"boxes: {candidate}"
        if (folder / f"splits_new_{candidate}.json").is_file() and (folder / f"images_{candidate}").is_dir():
            return _read_split(folder, candidate, note)
        if all((folder / candidate / part).is_dir() for part in MARKET_FOLDERS):
            dataset = read_market_like("cuhk03", folder / candidate, cameras=one_based(2))
            return replace(dataset, root=folder, notes=(note, *dataset.notes))
    if variant is None and all((folder / part).is_dir() for part in MARKET_FOLDERS):
        return read_market_like("cuhk03", folder, cameras=one_based(2))
    raise DatasetNotFound(f"cuhk03: variant must exist under {folder}, got {variant!r}, which does not")


def _read_split(folder: Path, variant: str, note: str) -> ReIDDataset:
    """The JSON holds one split: lists of [path, pid, camera from 0] under train, query and gallery.

    The paths are those of the machine that wrote it, so only the file names count.
    """
    images = os.path.join(os.path.abspath(folder), f"images_{variant}")
    file = folder / f"splits_new_{variant}.json"
    try:
        split = json.loads(file.read_text(encoding="utf-8"))[0]
        splits = {
            subset: sort_samples(
                Sample(os.path.join(images, path.replace("\\", "/").rsplit("/", 1)[-1]), int(pid), int(camid))
                for path, pid, camid in split[subset]
            )
            for subset in ("train", "query", "gallery")
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"cuhk03: {file} must be a list with one split of [path, pid, camid], got {error}") from error
    for subset, samples in splits.items():
        if not samples:
            raise ValueError(f"cuhk03: {shown(file)} must list {subset} images, got none")
        if not os.path.exists(samples[0].path):
            raise DatasetNotFound(
                f"cuhk03: {shown(file)} must list images under {shown(images)}, got {shown(samples[0].path)}"
            )
    return ReIDDataset(
        name="cuhk03",
        root=folder,
        train=relabel(splits["train"]),
        query=splits["query"],
        gallery=splits["gallery"],
        notes=(note,),
    )

# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401 (the imports below are for type checkers and editors)
"""Data sets, transforms, samplers and loaders. Names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastreid_u.data.cache import PixelCache
    from fastreid_u.data.catalogue import dataset_names, known_name, load_dataset
    from fastreid_u.data.dataset import ReIDDataset, Sample
    from fastreid_u.data.images import BadImage, read_rgb
    from fastreid_u.data.loader import ReIDLoader, chunks, make_loader
    from fastreid_u.data.locate import DatasetNotFound
    from fastreid_u.data.reader import Loaded
    from fastreid_u.data.samplers import (
        ClassUniformly,
        IdentitySampler,
        MoreCamera,
        RandomMultipleGallery,
        iterations,
    )
    from fastreid_u.data.transforms import View, test_transform, train_transform

_HOME = {
    "Sample": "dataset",
    "ReIDDataset": "dataset",
    "DatasetNotFound": "locate",
    "load_dataset": "catalogue",
    "dataset_names": "catalogue",
    "known_name": "catalogue",
    "BadImage": "images",
    "read_rgb": "images",
    "PixelCache": "cache",
    "Loaded": "reader",
    "chunks": "loader",
    "ReIDLoader": "loader",
    "make_loader": "loader",
    "IdentitySampler": "samplers",
    "RandomMultipleGallery": "samplers",
    "ClassUniformly": "samplers",
    "MoreCamera": "samplers",
    "iterations": "samplers",
    "View": "transforms",
    "train_transform": "transforms",
    "test_transform": "transforms",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

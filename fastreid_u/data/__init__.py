# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401 (the imports below are for type checkers and editors)
"""Data sets, transforms, samplers and loaders. Names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastreid_u.data.catalogue import dataset_names, known_name, load_dataset
    from fastreid_u.data.dataset import ReIDDataset, Sample
    from fastreid_u.data.images import BadImage, read_rgb
    from fastreid_u.data.loader import Batch, PixelCache, ReIDLoader, make_loader
    from fastreid_u.data.locate import DatasetNotFound
    from fastreid_u.data.samplers import (
        ClassUniformly,
        IdentitySampler,
        MoreCamera,
        NoCam,
        RandomIdentity,
        RandomMultipleGallery,
        iterations,
    )
    from fastreid_u.data.transforms import View, grey_transform, strong_transform, test_transform, train_transform

_HOME = {
    "Sample": "dataset",
    "ReIDDataset": "dataset",
    "DatasetNotFound": "locate",
    "load_dataset": "catalogue",
    "dataset_names": "catalogue",
    "known_name": "catalogue",
    "BadImage": "images",
    "read_rgb": "images",
    "Batch": "loader",
    "PixelCache": "loader",
    "ReIDLoader": "loader",
    "make_loader": "loader",
    "IdentitySampler": "samplers",
    "RandomMultipleGallery": "samplers",
    "NoCam": "samplers",
    "RandomIdentity": "samplers",
    "ClassUniformly": "samplers",
    "MoreCamera": "samplers",
    "iterations": "samplers",
    "View": "transforms",
    "train_transform": "transforms",
    "strong_transform": "transforms",
    "grey_transform": "transforms",
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

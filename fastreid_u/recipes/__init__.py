# SPDX-License-Identifier: Apache-2.0
"""Published methods, one file each. Names are looked up here; files are imported only when asked for."""

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

from fastreid_u.recipe import Recipe

_CLASSES = {
    "bmw": "BMW",
    "cacl": "CACL",
    "cap": "CAP",
    "cap_cluster_contrast": "CAPClusterContrast",
    "cap_cluster_contrast_proxy": "CAPClusterContrastProxy",
    "cluster_contrast": "ClusterContrast",
    "cluster_contrast_infomap": "ClusterContrastInfomap",
    "cluster_contrast_uda": "ClusterContrastUDA",
    "csa_hps": "CSAHPS",
    "dccc": "DCCC",
    "ice": "ICE",
    "pplr": "PPLR",
    "pplr_camera": "PPLRCamera",
    "spcl": "SpCL",
    "spcl_uda": "SpCLUDA",
    "vit_cluster_contrast": "ViTClusterContrast",
}


def methods() -> list[str]:
    """Names that ``train(..., method=...)`` knows."""
    return sorted(_CLASSES)


def get_method(method: str | type[Recipe]) -> type[Recipe]:
    """The recipe class of a name, ``"file.py:Class"`` or ``"module:Class"``; a ``Recipe`` subclass passes through."""
    if isinstance(method, type) and issubclass(method, Recipe):
        return method
    if ":" in str(method):
        return _own_method(method)
    if method not in _CLASSES:
        close = difflib.get_close_matches(str(method), _CLASSES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"train: method must be one of {', '.join(methods())}, got {method!r}{hint}")
    module = importlib.import_module(f"fastreid_u.recipes.{method}")
    return getattr(module, _CLASSES[method])


def _own_method(place: str) -> type[Recipe]:
    """A class of a user's own file or module."""
    where, _, name = place.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise FileNotFoundError(f"train: method must name a file that exists, got {place!r}")
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise ValueError(f"train: method must name a Recipe in {where}, got {name!r}")
    return found

# SPDX-License-Identifier: Apache-2.0
"""Published methods, one file each. Names are looked up here; files are imported only when asked for.

``fastreid_u.methods()`` lists the names. The name is a package and a function at once, because importing any recipe
binds the package to it; so the package itself can be called.
"""

import difflib
import importlib
import sys
import types

from fastreid_u.recipe import Recipe

_CLASSES = {"cluster_contrast": "ClusterContrast"}


def method_names() -> list[str]:
    """Names that ``train(..., method=...)`` knows."""
    return sorted(_CLASSES)


def get_method(method: str | type[Recipe]) -> type[Recipe]:
    """The recipe class of a name; a ``Recipe`` subclass of your own passes through."""
    if isinstance(method, type) and issubclass(method, Recipe):
        return method
    if method not in _CLASSES:
        close = difflib.get_close_matches(str(method), _CLASSES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"train: method must be one of {', '.join(method_names())}, got {method!r}{hint}")
    module = importlib.import_module(f"fastreid_u.methods.{method}")
    return getattr(module, _CLASSES[method])


class _CallablePackage(types.ModuleType):
    def __call__(self) -> list[str]:
        return method_names()


sys.modules[__name__].__class__ = _CallablePackage

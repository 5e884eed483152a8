# SPDX-License-Identifier: Apache-2.0
"""The one import of the compiled module ``fastreid_u._C``."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def core() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it is not built, is built for another Python, or a source tree hides the installed package.
    """
    try:
        return importlib.import_module("fastreid_u._C")
    except ImportError as error:
        raise ImportError(
            f"fastreid_u: the compiled module _C cannot be imported ({error}). In a source checkout run "
            "`pip install -e .` once; with an installed fastreid-u, start Python outside the source checkout, "
            "whose fastreid_u folder has no _C and hides the installed one."
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Reading weight files: the tensors by name, out of their wrappers and without the prefixes of parallel wrappers.

Nothing in a file is executed: safetensors, or torch's restricted unpickler.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher")
# What torch.load lets through on a damaged or foreign file, besides its own errors; tests/models/test_weights.py makes
# such files.
_DAMAGE = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError)
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile
_WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU; out of their wrapper and without prefixes.

    ``.safetensors`` is read by that library, anything else by ``torch.load(weights_only=True)``.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: not a weight file, or one that holds other objects than tensors, numbers and text; of an archive
            with weight files in it the message names these.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: path must be a file, got {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except SafetensorError as error:
            raise RuntimeError(f"read_weights: path must be a safetensors file, got {path}: {error}") from error
    else:
        _refuse_archive(path)
        found = _torch_load(path)
    found = _unwrapped(found)
    if not isinstance(found, Mapping):
        raise RuntimeError(f"read_weights: path must hold a dict of tensors, got a {type(found).__name__} in {path}")
    return named_tensors(found)


def named_tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a checkpoint that holds one, under their names without ``module.``."""
    found = _unwrapped(found)
    return {_strip(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _unwrapped(found: object) -> object:
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    return found


def _strip(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def _refuse_archive(path: Path) -> None:
    """A wheel or another zip that carries weight files; torch's own files are zips of another kind."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # damaged, which torch.load reports
    inside = [name for name in members if name.endswith(_WEIGHT_SUFFIXES)]
    if inside and not any(name.endswith("data.pkl") for name in members):
        listed = ", ".join(inside[:3]) + (" ..." if len(inside) > 3 else "")
        raise RuntimeError(
            f"read_weights: path must be a weight file, got {path}, an archive that holds {listed}; unzip it "
            f"(python -m zipfile -e {path.name} FOLDER) and give the file"
        )


class _Discarded:
    """Stands for a NumPy scalar in a checkpoint (its best mAP, say): whatever it is made from is dropped unread."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


def _torch_load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([(_Discarded, name) for name in _NUMPY_SCALAR]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RuntimeError(
            f"read_weights: path must hold tensors, numbers and text only, got {path}, whose other objects would have "
            "to be executed. If you trust it, save its state_dict alone where it was made, and load that"
        ) from error
    except _DAMAGE as error:
        raise RuntimeError(
            f"read_weights: path must be a readable weight file, got {path} ({type(error).__name__}: {error})"
        ) from error

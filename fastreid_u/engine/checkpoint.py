# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: each is written beside its place, flushed, then renamed over it.

No pickle: tensors lie in safetensors, everything else as JSON text, in a safetensors header where it describes tensors.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class SaveError(OSError):
    """A file of the run could not be written; what was there before is untouched."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, then put it in ``path``'s place in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask gives; safetensors gives its files to their owner alone
        write(partial)
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}; what was there before is intact") from error
    finally:
        with contextlib.suppress(OSError):  # nothing to remove where all went well
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="surrogateescape"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # safetensors wraps the system's error, "no space left" among them
            raise OSError(str(error)) from error

    write_whole(path, write)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and the header's metadata; a file that is torn or foreign is refused by name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def write_described(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write ``tensors`` with their description ``about`` in the header."""
    write_tensors(path, tensors, {"fastreid_u": json.dumps(about)})


def read_described(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that ``write_described`` wrote.

    Raises:
        ValueError: the file is torn, foreign, or without a description.
    """
    tensors, metadata = read_tensors(path)
    if "fastreid_u" not in metadata:
        raise ValueError(f"{path} holds no fastreid_u model: its header has no 'fastreid_u' entry")
    return tensors, json.loads(metadata["fastreid_u"])

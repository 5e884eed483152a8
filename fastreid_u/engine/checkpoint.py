# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: each is written beside its place, flushed, then renamed over it.

No pickle: tensors lie in safetensors, everything else as JSON text, in a safetensors header where it describes tensors.
The header also holds the SHA-256 of tensors and text, and what is read is compared with it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastreid_u.engine.own_file import read_own

CHECKSUM = "sha256"  # its name in a header
_ENTRIES = {"fastreid_u", "format", CHECKSUM}  # "format" is written by other programs that save a model again


class SaveError(OSError):
    """A file of the run could not be written; what was there before is untouched."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a new file, then put it in ``path``'s place in one step."""
    partial = partial_name(path, os.getpid())
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # a new file: a link of that name is not followed
            write(file)
            flush(file)
        os.replace(partial, path)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}; what was there before is intact") from error
    finally:
        with contextlib.suppress(OSError):  # nothing to remove where all went well
            partial.unlink()
    _flush_folder(path.parent)


def partial_name(path: Path, process: int | str) -> Path:
    """Where ``process`` writes what will lie at ``path``."""
    return path.with_name(f".{path.name}.{process}.part")


def flush(file: IO) -> None:
    """Have all of ``file`` on the disk, so that what is written after it cannot be there without it."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """The same for the names in ``folder``, where the system allows that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors``, ``metadata`` and the checksum of both. For a moment the tensors are in memory twice more."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, CHECKSUM: checksum(tensors, metadata)}
    write_whole(path, lambda file: file.write(save(tensors, metadata)))


def read_tensors(path: Path, op: str = "train") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and the header's metadata. For a moment the tensors are in memory twice.

    Files that were written before there were checksums are read without one.

    Raises:
        FileNotFoundError, PermissionError: as ``open``.
        ValueError: the file is torn, foreign or damaged, or no regular file; messages begin with ``op``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_own(path, op)
    try:
        tensors = load(data)
    except (SafetensorError, LookupError, AttributeError, TypeError) as error:  # the last three: an unknown dtype
        raise ValueError(f"{op}: {path} is not a readable safetensors file: {error}") from error
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    unknown = ", ".join(sorted(map(repr, metadata.keys() - _ENTRIES)))
    if unknown:
        raise ValueError(f"{op}: {path} must be as train wrote it, got {unknown} in its header")
    if metadata.get(CHECKSUM) not in (None, checksum(tensors, metadata)):
        raise ValueError(
            f"{op}: {path} is damaged: the SHA-256 of what it holds is not the one in its header. Use a copy of the "
            "file, or start another run"
        )
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata, and of each tensor's name, dtype, shape and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name, text in sorted(metadata.items()):
        if name != CHECKSUM:
            digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_described(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write ``tensors`` with their description ``about`` in the header."""
    write_tensors(path, tensors, {"fastreid_u": json.dumps(about)})


def read_described(path: Path, op: str = "train") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that ``write_described`` wrote; raises as ``read_tensors`` and ``description``.

    Nothing but the file is read, and nothing in it is run.
    """
    tensors, metadata = read_tensors(path, op)
    return tensors, description(metadata, path, op)


def description(metadata: Mapping[str, str], path: Path, op: str) -> dict[str, Any]:
    """What ``write_described`` put into the header of the file at ``path``; empty where it is no table.

    Raises:
        ValueError: there is none, or it is no JSON; messages begin with ``op``.
    """
    if "fastreid_u" not in metadata:
        raise ValueError(f"{op}: {path} holds no fastreid_u model: its header has no 'fastreid_u' entry")
    try:
        about = json.loads(metadata["fastreid_u"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {path} must be described by JSON in its header, got {error}") from error
    return about if isinstance(about, dict) else {}

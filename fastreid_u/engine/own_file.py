# SPDX-License-Identifier: Apache-2.0
"""Files of a run folder. The folder may come from someone else: a link in it may lead anywhere, a pipe has no end."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_own(path: Path, mode: str, **text: str) -> IO[str]:
    """``open(path, mode)``, for writing, of a regular file that lies at ``path`` itself, made if it is not there.

    Args:
        path: the file.
        mode: as for ``open``.
        text: ``encoding`` and ``errors``, as for ``open``.

    Raises:
        PermissionError: ``path`` is a link, a pipe or a device; nothing was read or written. OSError: as ``open``.
    """
    try:
        file = open(path, mode, opener=_at_once("O_NOFOLLOW"), **text)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise PermissionError(f"{path} must be a file of its own, got a link or a device") from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise PermissionError(f"{path} must be a file of its own, got a link or a device")
    return file


def read_own(path: str | os.PathLike, op: str, most: int = -1) -> bytes:
    """The bytes of a regular file at ``path``, or of one that a link there leads to; no more than ``most`` of them.

    Reading never waits.

    Raises:
        FileNotFoundError: it is not there. PermissionError: it may not be read.
        ValueError: a folder, a pipe, a socket or a device. Messages begin with ``op``.
    """
    try:
        _require_regular(path, op, os.stat(path).st_mode)
        with open(path, "rb", opener=_at_once()) as file:
            _require_regular(path, op, os.fstat(file.fileno()).st_mode)
            return file.read(most)
    except PermissionError as error:
        raise PermissionError(f"{op}: {path} must be a file that may be read, got {error.strerror}") from error


def _require_regular(path: str | os.PathLike, op: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{op}: {path} must be a regular file, got {_KINDS.get(stat.S_IFMT(mode), 'a device')}")


def _at_once(flag: str = "") -> Callable[[str, int], int]:
    """An opener that does not wait for the other end of a pipe; ``flag`` counts where the system has it."""
    more = getattr(os, "O_NONBLOCK", 0) | getattr(os, flag, 0)
    return lambda name, flags: os.open(name, flags | more, 0o666)

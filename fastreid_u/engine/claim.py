# SPDX-License-Identifier: Apache-2.0
"""A run folder has one owner: two runs that write into one folder would both end well and leave a mixture."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fastreid_u.engine.own_file import open_own

_NAME = ".lock"
_mine: set[Path] = set()  # a process may lock a file it has locked already, so what it holds is remembered


class FolderInUse(FileExistsError):
    """Another run, here or in another process, is writing into the folder."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Own ``folder``, which must exist, for as long as the block lasts. The lock of a killed process is gone with it.

    Raises:
        FolderInUse: someone else does. PermissionError: it cannot be written in.
    """
    folder = folder.resolve()
    if folder in _mine:
        raise FolderInUse(f"train: logs_dir must not be in use, got {folder}, which another run of this process holds")
    file = _locked(folder)
    _mine.add(folder)
    try:
        yield
    finally:
        _mine.discard(folder)
        with suppress(OSError):  # while it is still ours: whoever has opened it meanwhile will see that it is gone
            (folder / _NAME).unlink()
        file.close()


def _locked(folder: Path) -> IO[str]:
    while True:
        try:
            file = open_own(folder / _NAME, "a+")
        except OSError as error:
            raise PermissionError(f"train: cannot write in run folder {folder}: {error}") from error
        try:
            _lock(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise FolderInUse(
                    f"train: logs_dir must not be in use, got {folder}, where process {_owner(file)} runs"
                ) from None
            # a file system without locks: there it is left to the user
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / _NAME))
        except FileNotFoundError:  # its last owner has just removed it
            same = False
        if same:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()


def _owner(file: IO[str]) -> str:
    with file, suppress(OSError):  # Windows does not let a locked byte be read
        file.seek(0)
        return file.read().strip() or "another"
    return "another"


def _lock(file: IO[str]) -> None:
    """A lock of the process, not of the open file: the workers that it forks do not hold it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

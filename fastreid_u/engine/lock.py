# SPDX-License-Identifier: Apache-2.0
"""The lock of a run folder: two runs that write into one folder would both end well and leave a mixture."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fastreid_u.engine.own_file import open_own

_NAME = ".lock"
_held: set[Path] = set()  # the system lets a process lock a file twice, so its own locks are remembered here


class FolderInUse(FileExistsError):
    """Another run, here or in another process, is writing into the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which must exist, for as long as the block lasts; a killed process loses its own.

    Raises:
        FolderInUse: another run holds it. PermissionError: the folder cannot be written in.
    """
    folder = folder.resolve()
    if folder in _held:
        raise FolderInUse(f"train: logs_dir must not be in use, got {folder}, which another run of this process holds")
    file = _open_locked(folder)
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        with suppress(OSError):  # before the lock is let go: a process that has opened the file sees that it is gone
            (folder / _NAME).unlink()
        file.close()


def _open_locked(folder: Path) -> IO[str]:
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
            # else a file system without locks: there the user has to keep runs apart
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
    """Take a lock that belongs to the process, not to the open file: the workers that it forks do not hold it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

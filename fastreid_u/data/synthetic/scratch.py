# SPDX-License-Identifier: Apache-2.0
"""The folder in which a data set is rendered, before it has its name."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_SCRATCH = re.compile(r"\.synthetic-[0-9a-f]+-[a-z0-9_]{8}")  # as mkdtemp makes it


class _InUse(Exception):
    """Another process holds the lock."""


@contextmanager
def scratch_folder(final: Path) -> Iterator[Path]:
    """A new folder beside ``final``, gone at the end of the block unless it was renamed.

    A process locks the folder it renders into, and the lock ends with the process. So a folder that can be locked was
    left by one that was killed, and is removed. On systems without such locks it stays.
    """
    for left in final.parent.iterdir():
        if _SCRATCH.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            with suppress(_InUse, OSError), _locked(left) as has_locks:
                if has_locks:
                    shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as stack:
        scratch = None
        while scratch is None:
            made = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
            with suppress(_InUse):  # another process has taken it for a left one before it was locked
                stack.enter_context(_locked(made))
                scratch = made
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of ``folder`` in the block; False where there are no such locks.

    Raises:
        _InUse: another process holds it, or has removed the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as error:
        raise _InUse from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _InUse from error
        except OSError:  # a file system without locks
            has_locks = False
        else:
            has_locks = True
        if not folder.is_dir():
            raise _InUse
        yield has_locks
    finally:
        os.close(descriptor)

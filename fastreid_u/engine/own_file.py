# SPDX-License-Identifier: Apache-2.0
"""Files that a run writes in its folder. The folder may come from someone else, and a link in it may lead anywhere."""

import os
import stat
from pathlib import Path
from typing import IO


def open_own(path: Path, mode: str, **text: str) -> IO[str]:
    """``open(path, mode)`` of a regular file that lies at ``path`` itself, made if it is not there.

    Args:
        path: the file.
        mode: as for ``open``.
        text: ``encoding`` and ``errors``, as for ``open``.

    Raises:
        PermissionError: ``path`` is a link, a pipe or a device; nothing was read or written. OSError: as ``open``.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)

    try:
        file = open(path, mode, opener=opener, **text)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise PermissionError(f"{path} must be a file of its own, got a link or a device") from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise PermissionError(f"{path} must be a file of its own, got a link or a device")
    return file

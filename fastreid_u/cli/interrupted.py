# SPDX-License-Identifier: Apache-2.0
"""What an interrupted training leaves to go on from."""

import shlex
from pathlib import Path


def finished_epochs(logs_dir: str | None) -> dict[Path, int]:
    """Run folders that hold a finished epoch, and when it was written; all below runs/ where ``logs_dir`` is None."""
    from fastreid_u.engine.folder import RunFolder

    folders = RunFolder.all_unnamed() if logs_dir is None else [RunFolder(logs_dir)]
    return {folder.path: folder.finished_at for folder in folders if folder.finished_at is not None}


def how_to_go_on(now: dict[Path, int], before: dict[Path, int], method: str | None) -> str:
    """The command that goes on from a finished epoch that is there ``now`` and was not ``before``, if there is one."""
    new = [folder for folder in now if now[folder] != before.get(folder)]
    if not new:
        return "no epoch was finished, so there is none to go on from"
    folder = shlex.quote(str(max(new, key=now.get)))
    own = f" --method {shlex.quote(method)}" if method and ":" in method else ""  # a run knows the name, not the file
    return f"finished epochs are saved, go on with: fastreid-u train --logs-dir {folder} --resume{own}"

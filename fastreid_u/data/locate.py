# SPDX-License-Identifier: Apache-2.0
"""Finding folders and images on disk, and saying what was missing."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# What tells a run's folder, and the picture in it; both are there before the picture is (engine/folder.py, which
# data/ may not import). One alone could be a user's own.
_RUN_FILES = ("config.toml", "metrics.jsonl")
_RUN_PICTURE = "curves.png"

_MAX_DEPTH = 3  # market1501/Market-1501-v15.09.15/<folders> is the deepest nesting in use; one level to spare


class DatasetNotFound(FileNotFoundError):
    """The data are not where they were looked for; the message names the places, and who grants access."""


def plain_name(name: str) -> str:
    """Lower-case letters and digits only, so "Market-1501" and "market1501" are one name."""
    return "".join(c for c in name.lower() if c.isalnum())


def list_images(folder: str | os.PathLike, *, recursive: bool = False) -> list[str]:
    """Absolute paths of the image files in ``folder``, sorted; files are recognised by suffix and not opened.

    Hidden files (``._x.jpg`` left by some archivers), pipes and devices are skipped. ``recursive`` descends, through
    symbolic links too, but reads no folder twice: links that run in a circle end, and a folder that is also linked to
    counts once. A run's folder inside ``folder`` is not entered, for its curves are no crop. A million files take a few
    seconds and about 150 MB.
    """
    found: list[str] = []
    todo, links = [os.path.abspath(folder)], []
    seen: set[str] = set()  # where folders really are
    while todo or links:
        if not todo:  # links wait until nothing else is left, so that a folder goes by its own name if it has one
            links.sort(reverse=True)
            todo.append(links.pop())
        path = todo.pop()
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        skip = ""
        if all(os.path.exists(os.path.join(path, name)) for name in _RUN_FILES):
            if len(seen) > 1:
                continue
            skip = _RUN_PICTURE  # a run among the crops themselves: --logs-dir .
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == skip:
                    continue
                if _is_folder(entry):  # whatever its name ends with
                    if recursive:
                        (links if entry.is_symlink() else todo).append(entry.path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and _may_be_read(entry):
                    found.append(entry.path)
    found.sort()
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _may_be_read(entry: os.DirEntry) -> bool:
    """Not a pipe or a device, which could be waited for for ever; a dead link passes and is reported as unreadable."""
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def candidate_folders(root: Path, names: Iterable[str]) -> Iterator[Path]:
    """``root``, then the sub-folders that bear one of ``names``, then everything inside those, breadth first.

    Folders of other names directly under ``root`` are not entered: they may hold another data set.
    """
    accepted = {plain_name(name) for name in names}
    level = [(root, plain_name(root.name) in accepted)]
    for _ in range(_MAX_DEPTH + 1):
        below: list[tuple[Path, bool]] = []
        for folder, inside in level:
            yield folder
            children = _subfolders(folder)
            below += [(c, True) for c in children if inside or plain_name(c.name) in accepted]
        level = below


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # not there, or not ours to read: then nothing is found in it, and the error message shows that
        return []


def find_layout(
    name: str,
    root: str | os.PathLike,
    names: Iterable[str],
    layouts: Iterable[tuple[str, ...]],
    access: str,
) -> tuple[Path, int]:
    """First folder that contains every entry of one of ``layouts``.

    Args:
        name: the data set, for the message.
        root: where to start.
        names: folder names under which the set is known (compared by ``plain_name``).
        layouts: alternatives; each is a tuple of file or folder names that must all exist, empty where only the
            name of the folder tells.
        access: one sentence on who hands out the data.

    Returns:
        (folder, index of the layout).

    Raises:
        DatasetNotFound: nothing fits; lists what was looked for, where, and what was there instead.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))
    names, layouts = tuple(names), tuple(layouts)
    for folder in candidate_folders(root, names):
        named = plain_name(folder.name) in {plain_name(name) for name in names} and folder.is_dir()
        for i, layout in enumerate(layouts):
            if all(_is_there(folder / entry) for entry in layout) and (layout or named):
                return folder, i
    raise DatasetNotFound(_not_found(name, root, names, layouts, access))


def _is_there(path: Path) -> bool:
    """A pipe or a device is not: to read a list from one is to wait for its writer."""
    return path.is_dir() or path.is_file()


def _not_found(name: str, root: Path, names: tuple[str, ...], layouts: tuple[tuple[str, ...], ...], access: str) -> str:
    wanted = "\n".join("    " + ("  ".join(layout) or "(any images, in a folder of that name)") for layout in layouts)
    searched = list(candidate_folders(root, names))[:6]
    lines = [
        f"load_dataset: {name} must lie under its root, got {root}, where no folder holds",
        wanted,
        f"Sub-folders entered if named: {', '.join(names)}.",
        "Looked in:",
        *(f"    {folder}  ({_contents(folder)})" for folder in searched),
        f"Access: {access} This library reads local folders and downloads nothing.",
        "Another place: root=... (--data-dir), or the environment variable FASTREID_U_DATA.",
    ]
    return "\n".join(lines)


def _contents(folder: Path, limit: int = 8) -> str:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in entries)
    except OSError as error:
        return (error.strerror or "cannot be read").lower()
    if not names:
        return "empty"
    more = f", ... {len(names) - limit:,} more" if len(names) > limit else ""
    return "holds " + ", ".join(names[:limit]) + more

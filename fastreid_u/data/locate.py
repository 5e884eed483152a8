# SPDX-License-Identifier: Apache-2.0
"""Finding folders and images on disk, and saying what was missing."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastreid_u._text import visible

# Every name that Pillow gives the formats of data/images.py, so that a folder reads what a list of files reads.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

# What lies beside images in every data set and is not missed. Other files that are left out are named in a note.
_SIDECARS = {
    ".txt", ".md", ".rst", ".html", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ods", ".log", ".url", ".lnk",
    ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".lst", ".list",
    ".mat", ".npy", ".npz", ".h5", ".hdf5", ".pkl", ".pickle", ".parquet", ".pt", ".pth", ".safetensors",
    ".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".py", ".m", ".sh", ".ipynb", ".db", ".lock",
}  # fmt: skip
_SIDECAR_NAMES = {"readme", "license", "licence", "copying", "notice", "makefile"}

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


def shown(path: str | os.PathLike) -> str:
    """``path`` for messages: characters that steer a terminal, line breaks among them, become escapes."""
    return visible(os.fspath(path))


class Listing(NamedTuple):
    """Image files in a folder, and how many other files lie there by suffix, but for those that are not missed."""

    images: list[str]
    others: Counter[str]

    def notes(self, where: str = "") -> list[str]:
        """A line on the other files, or none; ``where`` names the folder."""
        if not self.others:
            return []
        ranked = sorted(self.others.items(), key=lambda kind: (-kind[1], kind[0]))
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in ranked[:6]) + (", ..." if len(ranked) > 6 else "")
        left_out = f"{self.others.total()} files left out, of types that are not read: {kinds}"
        return [f"{where}: {left_out}" if where else left_out]


def list_images(folder: str | os.PathLike, *, recursive: bool = False) -> list[str]:
    """Absolute paths of the image files in ``folder``, sorted, as ``list_files`` finds them."""
    return list_files(folder, recursive=recursive).images


def list_files(folder: str | os.PathLike, *, recursive: bool = False) -> Listing:
    """Absolute paths of the image files in ``folder``, sorted; files are recognised by suffix and not opened.

    Hidden files (``._x.jpg`` left by some archivers), pipes and devices are skipped. ``recursive`` descends, through
    symbolic links too, but reads no folder twice: links that run in a circle end, and a folder that is also linked to
    counts once. A run's folder inside ``folder`` is not entered, for its curves are no crop. A million files take a few
    seconds and about 150 MB.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
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
                if is_folder(entry):  # whatever its name ends with
                    if recursive:
                        (links if entry.is_symlink() else todo).append(entry.path)
                elif not _may_be_read(entry):
                    continue
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    found.append(entry.path)
                elif suffix := _missed(entry.name):
                    others[suffix] += 1
    found.sort()
    return Listing(found, others)


def _missed(name: str) -> str:
    """The suffix of a file that someone may take for an image; empty for what lies beside images as a rule."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in _SIDECARS or (not suffix and stem in _SIDECAR_NAMES):
        return ""
    return shown(suffix) or "without suffix"


def is_folder(entry: os.DirEntry) -> bool:
    """Whether ``entry`` is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
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
        f"load_dataset: {name} must lie under its root, got {shown(root)}, where no folder holds",
        wanted,
        f"Sub-folders entered if named: {', '.join(names)}.",
        "Looked in:",
        *(f"    {shown(folder)}  ({_contents(folder)})" for folder in searched),
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
    return "holds " + ", ".join(map(shown, names[:limit])) + more

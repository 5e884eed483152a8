# SPDX-License-Identifier: Apache-2.0
"""Any folder of crops: flat, nested, one sub-folder for each identity or camera, with or without a test split."""

import os
import re
from dataclasses import replace
from pathlib import Path

from fastreid_u.data.dataset import ReIDDataset, Sample
from fastreid_u.data.locate import list_files, shown
from fastreid_u.data.market import MARKET_FOLDERS, MARKET_NAME, read_market_like
from fastreid_u.data.rows import Row, from_rows
from fastreid_u.data.split_folders import PARTS, called_like_parts, find_split

_LAYOUTS = ("auto", "flat", "market", "by-identity", "by-camera")

_CAMERA_FOLDER = re.compile(r"(?:c|cam|camera)[-_ ]?\d+", re.IGNORECASE)

_MARKET_PATH = r"(?:^|/)(?P<pid>-?\d+)_c(?P<camid>\d+)[^/]*$"

# A sub-folder with more images than this is a shard of a large collection rather than one identity.
_IMAGES_OF_ONE = 500


def read_unlabelled(folder: Path) -> ReIDDataset:
    """Every image below ``folder``, whatever the nesting, without labels: shards of LUPerson and the like.

    About 0.3 kB of memory for an image; no file is opened.
    """
    files = list_files(folder, recursive=True)
    samples = tuple(Sample(path, -1, 0) for path in files.images)
    if not samples:
        raise ValueError(f"load_dataset: {shown(folder)} must hold images, got none")
    notes = ("no labels", *files.notes("folder"))
    return ReIDDataset(
        name=folder.name.lower(), root=folder, train=samples, has_pids=False, has_cameras=False, notes=notes
    )


def read_folder(folder: Path, *, layout: str = "auto", pattern: str | None = None) -> ReIDDataset:
    """Read a folder of crops. The labels found serve evaluation, cameras and diagnosis; training needs none.

    ``train/``, ``query/`` and ``gallery/`` inside the folder become the splits, in any case and in the other spellings
    that are in use (``split_folders``); ``test/`` beside ``query/`` is the gallery. Notes count what is left out.
    Without such folders everything is training data and there is nothing to evaluate, which is legal; so are a query
    and a gallery without training images, for a network that is trained. ``bounding_box_train/``, ``query/`` and
    ``bounding_box_test/`` are read as Market-1501 is, whatever the cameras and pids.

    Args:
        folder: searched with all its sub-folders.
        layout: where labels are. "flat": nowhere, sub-folders mean nothing. "market": file names
            ``<pid>_c<camera>...``. "by-identity" or "by-camera": the sub-folder's name. "auto": "market" if every name
            fits; "by-camera" if every image lies one folder deep and all folders are called c1, cam_2, camera3 and the
            like; "by-identity" if every image lies one folder deep in at least two folders of at most 500 images; else
            "flat". The choice is in ``notes``.
        pattern: regular expression with a group ``pid``, a group ``camid`` or both, searched in the path below the
            folder ("/" between parts); overrules ``layout``. Labels may be numbers or text.

    Raises:
        ValueError: no images; a pattern without these groups or that does not fit every image; labels missing from
            query or gallery; without ``layout`` and ``pattern``, folders that are called like parts of a split and do
            not make one, here or further down.
    """
    folder = Path(os.path.abspath(folder))
    name = folder.name
    if layout not in _LAYOUTS:
        raise ValueError(f"load_dataset: layout must be one of {_LAYOUTS}, got {layout!r}")
    guessed = pattern is None and layout == "auto"
    split = find_split(folder)
    if split is None:
        return _read_whole(folder, layout, pattern, guessed=guessed)
    names = [split.used[part][0] if part in split.used else "" for part in PARTS]
    if guessed and tuple(name.lower() for name in names) == MARKET_FOLDERS:
        dataset = read_market_like(name, folder, folders=names)
        return replace(dataset, notes=(*dataset.notes, *split.notes))
    splits: dict[str, list[Row]] = {part: [] for part in PARTS}
    notes = []
    for part, (below, files) in split.used.items():
        alike = called_like_parts(_below(folder / below, files.images)) if part == "train" else []
        if guessed and len(alike) > 1:
            raise _ambiguous(folder / below, alike)
        splits[part], how = _label(folder / below, files.images, layout, pattern)
        if files.images:
            notes.append(f"{split.title(part)}: {how}")
        elif part == "train":
            raise ValueError(f"load_dataset: {shown(folder / below)} must hold images, got none")
    for part, (_, files) in split.used.items():
        notes += files.notes(split.title(part))
    return from_rows(name, folder, *splits.values(), notes=[*notes, *split.notes])


def _read_whole(folder: Path, layout: str, pattern: str | None, *, guessed: bool) -> ReIDDataset:
    """A folder without a split: every image below it is a training image."""
    files = list_files(folder, recursive=True)
    if not files.images:
        others = "".join(f" ({note})" for note in files.notes("folder"))
        raise ValueError(f"load_dataset: {shown(folder)} must hold images, got none{others}")
    notes = []
    if alike := called_like_parts(_below(folder, files.images)):
        if guessed:
            raise _ambiguous(folder, alike)
        notes = [f"{', '.join(alike)}: trained on as well, though called like parts of a split"]
    rows, how = _label(folder, files.images, layout, pattern)
    return from_rows(folder.name, folder, rows, [], [], notes=[f"folder: {how}", *notes, *files.notes("folder")])


def _ambiguous(folder: Path, alike: list[str]) -> ValueError:
    return ValueError(
        f"load_dataset: {shown(folder)} must hold crops to train on, or train/, query/ and gallery/, got "
        f"{', '.join(alike)}, with test images perhaps. Name the folder of the split or of the training images, "
        "rename, or choose layout= or pattern= for all images"
    )


def _below(part: Path, paths: list[str]) -> list[str]:
    skip = len(os.path.join(part, ""))
    return [path[skip:].replace(os.sep, "/") for path in paths]


def _label(part: Path, paths: list[str], layout: str, pattern: str | None) -> tuple[list[Row], str]:
    """Rows of one split, and in words where their labels come from."""
    below = _below(part, paths)
    if pattern is not None:
        return _by_pattern(paths, below, pattern), f"labels by the pattern {shown(pattern)}"
    if layout == "auto":
        layout = _guess(below)
    if layout == "market":
        return _by_pattern(paths, below, _MARKET_PATH), "names <pid>_c<camera>"
    tops = [path.split("/", 1)[0] if "/" in path else None for path in below]
    if layout == "by-identity":
        return [Row(path, top, None) for path, top in zip(paths, tops, strict=True)], "one sub-folder for each identity"
    if layout == "by-camera":
        return [Row(path, None, top) for path, top in zip(paths, tops, strict=True)], "one sub-folder for each camera"
    return [Row(path, None, None) for path in paths], "no labels"


def _by_pattern(paths: list[str], below: list[str], pattern: str) -> list[Row]:
    compiled = re.compile(pattern)
    groups = set(compiled.groupindex)
    if not groups & {"pid", "camid"}:
        raise ValueError(f"load_dataset: pattern must have a group named pid or camid, got {pattern!r}")
    rows: list[Row] = []
    for path, text in zip(paths, below, strict=True):
        match = compiled.search(text)
        if match is None:
            raise ValueError(f"load_dataset: pattern must fit every image, got {text!r}, which {pattern!r} does not")
        found = match.groupdict()
        rows.append(Row(path, found.get("pid"), found.get("camid")))
    return rows


def _guess(below: list[str]) -> str:
    if below and all(MARKET_NAME.match(path.rsplit("/", 1)[-1]) for path in below):
        return "market"
    if not below or any(path.count("/") != 1 for path in below):
        return "flat"
    sizes: dict[str, int] = {}
    for path in below:
        top = path.split("/", 1)[0]
        sizes[top] = sizes.get(top, 0) + 1
    if all(_CAMERA_FOLDER.fullmatch(top) for top in sizes):
        return "by-camera"
    return "by-identity" if len(sizes) > 1 and max(sizes.values()) <= _IMAGES_OF_ONE else "flat"

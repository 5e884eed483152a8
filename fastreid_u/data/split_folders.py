# SPDX-License-Identifier: Apache-2.0
"""Folders that are called like parts of a data set: which part each one is, and what is left out."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastreid_u.data.locate import Listing, is_folder, list_files, plain_name, shown

PARTS = ("train", "query", "gallery")

# What a part is called, in the letters and digits that ``plain_name`` leaves, and what may stand before and after it:
# bounding_box_test, image_query, "Train images", mask_train_v2, val2017.
_WORDS = {
    "train": "train(?:ing)?(?:all|val)?",
    "val": "val(?:id(?:ation)?)?",
    "query": "quer(?:y|ies)|probes?",
    "gallery": "galler(?:y|ies)",
    "test": "test(?:ing)?",
}
_BEFORE = "(?:boundingbox|bbox|images?|imgs?|mask|crops?)?"
_AFTER = r"(?:set|split|data|images?|imgs?|crops?)?(?:v\d|\d{4})?"
_PARTS = {part: re.compile(f"{_BEFORE}(?:{word}){_AFTER}") for part, word in _WORDS.items()}


@dataclass(frozen=True)
class SplitFolders:
    """The parts of a data set by folder.

    Attributes:
        used: from train, query and gallery to the folder's name and its files; what is not there is not in it.
        notes: what was left out, with counts, and why.
    """

    used: dict[str, tuple[str, Listing]]
    notes: list[str]

    def title(self, part: str) -> str:
        """The folder of ``part`` for notes: its name, and the part where that is another word."""
        name = shown(self.used[part][0])
        return name if name.lower() == part else f"{name} ({part})"


def part_of(name: str) -> str | None:
    """train, val, query, gallery or test for a folder that is called so, whatever its case; else None."""
    plain = plain_name(name)
    return next((part for part, pattern in _PARTS.items() if pattern.fullmatch(plain)), None)


def _preference(name: str) -> tuple[bool, bool, bool, str]:
    """Of several folders for one part the first is used: the plain word, small letters, no union of two parts."""
    plain = plain_name(name)
    return (plain not in (*PARTS, "test"), name != name.lower(), plain.endswith(("all", "val")), name)


def find_split(folder: Path) -> SplitFolders | None:
    """The split that the sub-folders of ``folder`` make; None where they make none.

    Images for training, or a query beside a gallery, make a split. ``test`` is the gallery if there is a query and no
    gallery.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith("."))
    named = [name for name in names if part_of(name)]
    if not named:
        return None
    files = {name: list_files(folder / name, recursive=True) for name in names}
    found: dict[str, list[str]] = {}
    for name in sorted(named, key=lambda name: (not files[name].images, _preference(name))):
        if files[name].images or part_of(name) == "train":
            found.setdefault(part_of(name), []).append(name)
    chosen = {part: found[part][0] for part in PARTS if part in found}
    if "query" in chosen and "gallery" not in chosen and "test" in found:
        chosen["gallery"] = found["test"][0]
    if "train" not in chosen and not {"query", "gallery"} <= set(chosen):
        return None
    used = {part: (chosen[part], files[chosen[part]]) for part in PARTS if part in chosen}
    left = {name: len(files[name].images) for name in names if name not in chosen.values() and files[name].images}
    return SplitFolders(used, _left_out(chosen, left, len(list_files(folder).images)))


def called_like_parts(below: list[str]) -> list[str]:
    """Folders that make no split and are called as if they did: in ``below`` itself one, further down two at one depth.

    Args:
        below: paths of images below a folder, with "/".

    Returns:
        One folder for each part, shown as it is for messages; empty if nothing looks like a split.
    """
    depths: dict[int, dict[str, str]] = {}  # depth -> part -> the first folder that is called so
    for parent in sorted({path.rpartition("/")[0] for path in below}):
        steps = parent.split("/")
        for depth, step in enumerate(steps):
            if part := part_of(step):
                depths.setdefault(depth, {}).setdefault(part, "/".join(steps[: depth + 1]))
    for depth, found in sorted(depths.items()):
        if len(found) > 1 or depth == 0:
            return [f"{shown(name)}/" for name in found.values()]
    return []


def _left_out(chosen: dict[str, str], left: dict[str, int], beside: int) -> list[str]:
    """A note for each folder of a part that is not used, and one each for other folders and for images beside them."""
    notes, others = [], {}
    for name, count in left.items():
        part = part_of(name)
        if part is None:
            others[name] = count
            continue
        if part in chosen:
            reason = f"{shown(chosen[part])} is used"
        elif part == "test" and "gallery" in chosen:
            reason = f"{shown(chosen['gallery'])} is the gallery"
        elif part == "test":
            reason = "it is the gallery only where there is a query folder"
        else:
            reason = "it is neither trained on nor ranked"
        notes.append(f"{shown(name)}: {count} images left out, {reason}")
    if others:
        listed = ", ".join(map(shown, list(others)[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        notes.append(f"{listed}: {sum(others.values())} images left out, no part of the split is called so")
    if beside:
        notes.append(f"{beside} images left out, they lie beside the folders of the split")
    return notes

# SPDX-License-Identifier: Apache-2.0
"""Users' own data: from rows of text to a data set with numbers."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastreid_u.data.dataset import ReIDDataset, Sample, sort_samples
from fastreid_u.data.label_text import is_gap, numbering, shortened_number, whole_number
from fastreid_u.data.locate import shown

_SHORTENED_BY_PROGRAMS = 10**10  # spreadsheets write 1.23457E+11, pandas 1e+16; 1e3 is a number like any other


class Row(NamedTuple):
    """One image before its labels are numbers: identity and camera as written, None where not given."""

    path: str
    pid: str | None
    camera: str | None


def from_rows(
    name: str, root: Path, train: list[Row], query: list[Row], gallery: list[Row], notes: Iterable[str] = ()
) -> ReIDDataset:
    """Number the identities and cameras of users' own data, as ``label_text`` reads them.

    Cameras become 0..n-1 in ascending order over all splits. Pids of query and gallery are kept if they are integers of
    64 bits, else numbered likewise, one numbering for both. A gap ("nan", "None", ...) is an unknown label, and so is a
    negative number; an image of a negative identity in query or gallery is junk and left out. A part whose cameras are
    not all known, training or test, gets camera 0 throughout.

    Raises:
        ValueError: a query or gallery image without an identity: it could not be evaluated.
    """
    rows = [*train, *query, *gallery]
    notes = [*notes, *_label_notes("identity", (row.pid for row in rows))]
    notes += _label_notes("camera", (row.camera for row in rows))
    train = [_cleaned(row) for row in train]
    test = [[_cleaned(row) for row in rows if not _is_junk(row)] for rows in (query, gallery)]
    for split, given, kept in zip(("query", "gallery"), (query, gallery), test, strict=True):
        if len(kept) < len(given):
            notes.append(f"{split}: {len(given) - len(kept)} images left out as junk, their identity is negative")
    both = [*test[0], *test[1]]
    for row in both:
        if row.pid is None:
            raise ValueError(
                f"{shown(name)}: query and gallery images must have an identity, got none for {shown(row.path)}"
            )
    train_pids = numbering(row.pid for row in train)
    test_pids = numbering((row.pid for row in both), keep_integers=True)
    cameras = numbering(row.camera for row in (*train, *both))
    nameless = sum(row.pid is None for row in train)
    if nameless and train_pids:
        notes.append(
            f"{nameless} of {len(train)} training images have no identity: they do not count in ARI, NMI and ids"
        )
    if both and not all(test):
        there, missing = ("query", "gallery") if test[0] else ("gallery", "query")
        notes.append(f"{there}: {len(both)} images, but no {missing}: they are not ranked")
    notes += _camera_notes(train, both)
    known = {part: all(row.camera is not None for row in rows) for part, rows in (("train", train), ("test", both))}

    def number(rows: list[Row], pids: dict[str, int], part: str) -> tuple[Sample, ...]:
        return sort_samples(
            Sample(row.path, -1 if row.pid is None else pids[row.pid], cameras[row.camera] if known[part] else 0)
            for row in rows
        )

    splits = (number(train, train_pids, "train"), *(number(rows, test_pids, "test") for rows in test))
    used = [{sample.camid for sample in samples} for samples in (splits[0], splits[1] + splits[2])]
    return ReIDDataset(
        name=name,
        root=root,
        train=splits[0],
        query=splits[1],
        gallery=splits[2],
        has_pids=bool(train_pids),
        has_cameras=any(len(camids) > 1 for camids in used),
        notes=tuple(notes),
    )


def _cleaned(row: Row) -> Row:
    return Row(row.path, _label(row.pid), _label(row.camera))


def _label(text: str | None) -> str | None:
    """``text`` without blanks around it; None if it stands for no value, as a negative number does."""
    text = "" if text is None else text.strip()
    number = None if is_gap(text) else whole_number(text)
    return None if is_gap(text) or (number is not None and number < 0) else text


def _is_junk(row: Row) -> bool:
    number = whole_number((row.pid or "").strip())
    return number is not None and number < 0


def _label_notes(label: str, texts: Iterable[str | None]) -> list[str]:
    """What was read as no value though something is written, and what a table program may have shortened."""
    notes = []
    written = [text for text in ((text or "").strip() for text in texts) if text]
    gaps = [text for text in written if is_gap(text)]
    if gaps:
        notes.append(f"{label} of {len(gaps)} images: {', '.join(sorted(set(gaps)))} count as empty")
    if label == "camera" and (negative := sum((whole_number(text) or 0) < 0 for text in written)):
        notes.append(f"camera of {negative} images: negative numbers count as empty")
    short = [text for text in written if (shortened_number(text) or 0) >= _SHORTENED_BY_PROGRAMS]
    if short:
        notes.append(
            f"{label} of {len(short)} images: table programs shorten long numbers, as in {short[0]}, and may have "
            "merged some"
        )
    return notes


def _camera_notes(train: list[Row], test: list[Row]) -> list[str]:
    """Why cameras are not used, in training and in the evaluation."""
    notes = []
    cameras = [{row.camera for row in rows} for rows in (train, test)]
    if cameras[0] | cameras[1] <= {None}:
        return []
    if not test and None in cameras[0]:
        return [f"{sum(row.camera is None for row in train)} images have no camera: cameras are not used"]
    if len(cameras[0] | cameras[1]) == 1:
        return ["one camera only: cameras are not used"]
    for what, effect, rows, seen in (
        ("training", "training does without cameras", train, cameras[0]),
        ("query and gallery", "a query is also ranked against images of its own camera", test, cameras[1]),
    ):
        if None in seen:
            unknown = sum(row.camera is None for row in rows)
            notes.append(f"{unknown} of {len(rows)} {what} images have no camera: {effect}")
        elif len(seen) == 1:
            notes.append(f"{what} images are of one camera only: {effect}")
    return notes

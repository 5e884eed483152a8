# SPDX-License-Identifier: Apache-2.0
"""A CSV file that lists images: the way to bring any data with any labels."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from fastreid_u.data.dataset import ReIDDataset
from fastreid_u.data.label_text import is_gap
from fastreid_u.data.locate import DatasetNotFound, shown
from fastreid_u.data.rows import Row, from_rows

_SPLITS = ("train", "query", "gallery")
_COLUMNS = ("path", "pid", "camid", "split")


def read_csv(path: Path) -> ReIDDataset:
    """Read a UTF-8 CSV file with a header: ``path``, and if you have them ``pid``, ``camid``, ``split``.

    Relative paths count from the CSV's folder. ``split`` is train (also if empty), query or gallery. Labels may be
    numbers or text, an empty cell is "unknown", as are the marks that table programs write for it (``label_text``).
    Columns and splits may be written in capitals. Other columns are ignored; a note names them.

    Raises:
        ValueError: not UTF-8 text, no ``path`` column, a column twice, a row with more cells than the header, an
            unknown split, an empty path, no training image.
        DatasetNotFound: the first image of a split is not there.
    """
    path = Path(os.path.abspath(path))
    try:
        rows, notes = _read_rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"load_dataset: {shown(path)} must be a CSV file in UTF-8, got {error}") from error
    if not rows["train"]:
        raise ValueError(f"load_dataset: {shown(path)} must list at least one training image, got none")
    for listed in rows.values():
        if listed and not os.path.exists(listed[0].path):
            raise DatasetNotFound(
                f"load_dataset: images listed in {shown(path)} must exist, relative to its folder, got "
                f"{shown(listed[0].path)}"
            )
    return from_rows(path.stem, path.parent, *(rows[split] for split in _SPLITS), notes=notes)


def _read_rows(path: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of each split, in the order of the file, and what was not read."""
    rows: dict[str, list[Row]] = {split: [] for split in _SPLITS}
    unsplit = 0
    with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets write a byte-order mark
        reader = csv.DictReader(file, skipinitialspace=True)
        reader.fieldnames, ignored = _header(path, reader.fieldnames)
        for record in reader:
            where = f"{shown(path)} line {reader.line_num}"
            if any(record.pop(None, ())):
                raise ValueError(
                    f"load_dataset: a row must have at most the header's {len(reader.fieldnames)} cells, got more in "
                    f"{where}; a path with a comma needs quotes"
                )
            cells = {column: (record.get(column) or "").strip() for column in _COLUMNS}
            given = "" if is_gap(cells["split"]) else cells["split"]
            unsplit += not given
            split = given.lower() or "train"
            if split not in rows:
                raise ValueError(f"load_dataset: split must be one of {_SPLITS}, got {given!r} in {where}")
            if is_gap(cells["path"]):
                raise ValueError(f"load_dataset: path must not be empty, got an empty cell in {where}")
            image = os.path.normpath(os.path.join(path.parent, os.path.expanduser(cells["path"])))
            rows[split].append(Row(image, cells["pid"] or None, cells["camid"] or None))
    notes = [f"columns not read: {', '.join(ignored)}"] if ignored else []
    if unsplit < sum(map(len, rows.values())) and unsplit:
        notes.append(f"{unsplit} images without a split are training images")
    return rows, notes


def _header(path: Path, given: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The columns, ours in small letters, and the names of those that are not ours."""
    written = [column.strip() for column in given or ()]
    other_case = {column.lower() for column in written if column not in _COLUMNS} - {*written}
    header = [column.lower() if column.lower() in other_case & {*_COLUMNS} else column for column in written]
    if "path" not in header:
        raise ValueError(f"load_dataset: {shown(path)} must have a header with a path column, got {written}")
    for column in _COLUMNS:
        if header.count(column) > 1:
            raise ValueError(f"load_dataset: {shown(path)} must have one column {column}, got {written}")
    return header, [shown(column) for column in header if column and column not in _COLUMNS]

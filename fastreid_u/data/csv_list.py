# SPDX-License-Identifier: Apache-2.0
"""A CSV file that lists images: the way to bring any data with any labels."""

import csv
import os
from pathlib import Path

from fastreid_u.data.dataset import ReIDDataset, Row, from_rows
from fastreid_u.data.locate import DatasetNotFound

_SPLITS = ("train", "query", "gallery")


def read_csv(path: Path) -> ReIDDataset:
    """Read a UTF-8 CSV file with a header: ``path``, and if you have them ``pid``, ``camid``, ``split``.

    Relative paths count from the CSV's folder. ``split`` is train (also if empty), query or gallery. Labels may be
    numbers or text, an empty cell is "unknown"; other columns are ignored.

    Raises:
        ValueError: not UTF-8 text, no ``path`` column, an unknown split, an empty path, no training image.
        DatasetNotFound: the first image of a split is not there.
    """
    path = Path(os.path.abspath(path))
    try:
        rows = _read_rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"load_dataset: {path} must be a CSV file in UTF-8, got {error}") from error
    if not rows["train"]:
        raise ValueError(f"load_dataset: {path} must list at least one training image, got none")
    for listed in rows.values():
        if listed and not os.path.exists(listed[0][0]):
            raise DatasetNotFound(
                f"load_dataset: images listed in {path} must exist, relative to its folder, got {listed[0][0]}"
            )
    return from_rows(path.stem, path.parent, *(rows[split] for split in _SPLITS))


def _read_rows(path: Path) -> dict[str, list[Row]]:
    """The rows of each split, in the order of the file."""
    rows: dict[str, list[Row]] = {split: [] for split in _SPLITS}
    with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets write a byte-order mark
        reader = csv.DictReader(file, skipinitialspace=True)
        header = [column.strip() for column in reader.fieldnames or ()]
        if "path" not in header:
            raise ValueError(f"load_dataset: {path} must have a header with a path column, got {header}")
        reader.fieldnames = header
        for record in reader:
            cells = {column: (record.get(column) or "").strip() for column in ("path", "pid", "camid", "split")}
            split = cells["split"] or "train"
            where = f"{path} line {reader.line_num}"
            if split not in rows:
                raise ValueError(f"load_dataset: split must be one of {_SPLITS}, got {split!r} in {where}")
            if not cells["path"]:
                raise ValueError(f"load_dataset: path must not be empty, got an empty cell in {where}")
            image = os.path.normpath(os.path.join(path.parent, os.path.expanduser(cells["path"])))
            rows[split].append((image, cells["pid"] or None, cells["camid"] or None))
    return rows

# SPDX-License-Identifier: Apache-2.0
"""Which paths lead to one file: other spellings, symbolic links and hard links."""

import dataclasses
import os
from collections.abc import Iterable

from fastreid_u.data.dataset import ReIDDataset


def file_numbers(paths: Iterable[str]) -> list[int]:
    """A number for each path, the same for all that lead to one file; they count from 0."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(_file(path), len(numbers)) for path in paths]


def with_shared_files_noted(dataset: ReIDDataset) -> ReIDDataset:
    """``dataset``, with a note if files of its training part are in query or gallery too: those are trained on."""
    train, test = dataset.train, dataset.query + dataset.gallery
    numbers = file_numbers(sample.path for sample in (*train, *test)) if test else []
    trained = set(numbers[: len(train)])
    shared = len(trained.intersection(numbers[len(train) :]))
    note = f"{shared} of {len(trained)} training images are in query or gallery too: the figures flatter the network"
    if not shared or note in dataset.notes:
        return dataset
    return dataclasses.replace(dataset, notes=(*dataset.notes, note))


def _file(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:  # there is no such file; who reads it reports that
        return os.path.abspath(path)
    return found.st_dev, found.st_ino

# SPDX-License-Identifier: Apache-2.0
"""Which paths lead to one file: other spellings, symbolic links and hard links; and which files are copies."""

import dataclasses
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence

from fastreid_u.data.dataset import ReIDDataset, Sample


def file_numbers(paths: Iterable[str]) -> list[int]:
    """A number for each path, the same for all that lead to one file; they count from 0."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(_file(path), len(numbers)) for path in paths]


def image_numbers(paths: Sequence[str]) -> list[int]:
    """As ``file_numbers``, and one number for files of the same bytes too. Reads the files that share a size."""
    numbers, sizes = file_numbers(paths), [_size(path) for path in paths]
    shared, known = Counter(sizes), dict[tuple[int, bytes], int]()
    for place, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if size is not None and shared[size] > 1:
            with open(path, "rb") as file:
                content = size, hashlib.file_digest(file, "sha256").digest()
            numbers[place] = known.setdefault(content, numbers[place])
    return numbers


def with_shared_files_noted(dataset: ReIDDataset) -> ReIDDataset:
    """``dataset``, with a note if files of its training part are in query or gallery too: those are trained on."""
    return with_leak_noted(dataset, "training", dataset.train)


def with_leak_noted(dataset: ReIDDataset, kind: str, trained: Sequence[Sample]) -> ReIDDataset:
    """``dataset``, with a note of how many images of ``trained``, of this ``kind``, its query or gallery hold too."""
    shared = shared_files(trained, dataset.query + dataset.gallery)
    note = f"{shared} of {len(trained)} {kind} images are in query or gallery too: the figures flatter the network"
    if not shared or note in dataset.notes:
        return dataset
    return dataclasses.replace(dataset, notes=(*dataset.notes, note))


def shared_files(first: Sequence[Sample], second: Sequence[Sample]) -> int:
    """How many of the ``first`` are files that the ``second`` hold too."""
    numbers = file_numbers(sample.path for sample in (*first, *second)) if first and second else []
    others = set(numbers[len(first) :])
    return sum(number in others for number in numbers[: len(first)])


def _file(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:  # there is no such file; who reads it reports that
        return os.path.abspath(path)
    return found.st_dev, found.st_ino


def _size(path: str) -> int | None:
    """Bytes of a file; None where there is none, or it is a pipe or a folder."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None

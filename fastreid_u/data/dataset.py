# SPDX-License-Identifier: Apache-2.0
"""What every reader returns: three tuples of samples and what is known about them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """One image file.

    Attributes:
        path: absolute path of the file.
        pid: identity; -1 where unknown. Training pids are 0..n-1 and serve diagnosis only, never training.
        camid: camera, 0-based; 0 everywhere where cameras are unknown.
    """

    path: str
    pid: int
    camid: int


@dataclass(frozen=True)
class ReIDDataset:
    """A Re-ID data set on disk. Every split is sorted by path; that order numbers features, labels and memory rows.

    Attributes:
        name: short name, as given to ``load_dataset``.
        root: folder in which the data were found.
        train, query, gallery: the splits; query and gallery are empty for a plain folder of crops. Pids of ``train``
            and of the test splits are separate numberings: the same number does not mean the same person.
        has_pids: whether identities of ``train`` are known, at least of some images; the others have pid -1.
        has_cameras: whether cameras are known and more than one. If not, evaluation must not remove same-camera
            matches (it would remove all of them) and camera-aware methods do not apply.
        notes: what a user should know about how the files were read.
    """

    name: str
    root: Path
    train: tuple[Sample, ...]
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    has_pids: bool = True
    has_cameras: bool = True
    notes: tuple[str, ...] = ()

    @property
    def num_cameras(self) -> int:
        """Number of distinct cameras among the training images (1 where cameras are unknown)."""
        return len({sample.camid for sample in self.train})

    def table(self) -> str:
        """The ``subset | # ids | # images | # cameras`` table, one subset a line; "-" marks what is not known."""
        rows = [("subset", "# ids", "# images", "# cameras")]
        for subset, samples in (("train", self.train), ("query", self.query), ("gallery", self.gallery)):
            known = {sample.pid for sample in samples if sample.pid >= 0}
            ids = f"{len(known):,}" if known else "-"
            cameras = f"{len({sample.camid for sample in samples}):,}" if samples and self.has_cameras else "-"
            rows.append((subset, ids, f"{len(samples):,}", cameras))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return " | ".join(cells)

        return "\n".join([line(rows[0]), "-+-".join("-" * width for width in widths), *map(line, rows[1:])])


def sort_samples(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The canonical order: by path (paths are unique, so pid and camid never decide)."""
    return tuple(sorted(samples))


def relabel(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Replace known pids by 0..n-1 in ascending order of the old pid; -1 (unknown) stays -1."""
    samples = tuple(samples)
    new = {pid: i for i, pid in enumerate(sorted({sample.pid for sample in samples if sample.pid >= 0}))}
    return tuple(sample._replace(pid=new.get(sample.pid, -1)) for sample in samples)


# One image before its labels are numbers: path, identity and camera as written, None where not given.
Row = tuple[str, str | None, str | None]


def from_rows(
    name: str, root: Path, train: list[Row], query: list[Row], gallery: list[Row], notes: Iterable[str] = ()
) -> ReIDDataset:
    """Number the identities and cameras of users' own data.

    Cameras, integers or any text, become 0..n-1 in ascending order over all splits. Pids of query and gallery are
    kept if they are integers, else numbered likewise. "-1" is "unknown" in train and junk in query and gallery.

    Raises:
        ValueError: a query or gallery image without an identity: it could not be evaluated.
    """
    test = [[row for row in rows if row[1] != "-1"] for rows in (query, gallery)]
    train = [(path, None if pid == "-1" else pid, camera) for path, pid, camera in train]
    for row in (*test[0], *test[1]):
        if row[1] is None:
            raise ValueError(f"{name}: query and gallery images must have an identity, got none for {row[0]}")
    train_pids = _numbering(pid for _, pid, _ in train)
    test_pids = _numbering((pid for _, pid, _ in (*test[0], *test[1])), keep_integers=True)
    splits = (train, *test)
    cameras = _numbering(camera for rows in splits for _, _, camera in rows)
    notes = list(notes)
    nameless = sum(pid is None for _, pid, _ in train)
    if nameless and train_pids:
        notes.append(
            f"{nameless} of {len(train)} training images have no identity: they do not count in ARI, NMI and ids"
        )
    unseen = sum(camera is None for rows in splits for _, _, camera in rows)
    if unseen and cameras:
        notes.append(f"{unseen} images have no camera: cameras are not used")
    elif len(cameras) == 1:
        notes.append("one camera only: cameras are not used")
    has_cameras = not unseen and len(cameras) > 1

    def number(rows: list[Row], pids: dict[str, int]) -> tuple[Sample, ...]:
        return sort_samples(
            Sample(path, -1 if pid is None else pids[pid], cameras[camera] if has_cameras else 0)
            for path, pid, camera in rows
        )

    return ReIDDataset(
        name=name,
        root=root,
        train=number(train, train_pids),
        query=number(test[0], test_pids),
        gallery=number(test[1], test_pids),
        has_pids=bool(train_pids),
        has_cameras=has_cameras,
        notes=tuple(notes),
    )


def _numbering(values: Iterable[str | None], *, keep_integers: bool = False) -> dict[str, int]:
    """From label text to a number: ascending order, numerically if every label is an integer ("7" is "007")."""
    texts = {value for value in values if value is not None}
    if all(text.lstrip("-").isdecimal() for text in texts):
        integers = {text: int(text) for text in texts}
        if keep_integers:
            return integers
        rank = {value: i for i, value in enumerate(sorted(set(integers.values())))}
        return {text: rank[value] for text, value in integers.items()}
    return {text: i for i, text in enumerate(sorted(texts))}

# SPDX-License-Identifier: Apache-2.0
"""What every reader returns: three tuples of samples and what is known about them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fastreid_u.data.locate import shown

_INT64 = 2**63


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
        has_cameras: whether cameras are known, at least those of one part. False: camids mean nothing. Training asks
            ``has_train_cameras``, the evaluation ``has_test_cameras``.
        notes: what a user should know about how the files were read.

    Raises:
        ValueError: a pid or camid that no tensor can hold.
    """

    name: str
    root: Path
    train: tuple[Sample, ...]
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    has_pids: bool = True
    has_cameras: bool = True
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for sample in chain(self.train, self.query, self.gallery):
            if not (-_INT64 <= sample.pid < _INT64 and -_INT64 <= sample.camid < _INT64):
                field = "camid" if -_INT64 <= sample.pid < _INT64 else "pid"
                raise ValueError(
                    f"ReIDDataset: {field} must be an integer of 64 bits, got {getattr(sample, field)} for "
                    f"{shown(sample.path)}"
                )

    @property
    def has_train_cameras(self) -> bool:
        """Whether the training images are of two known cameras or more; if not, camera-aware methods do not apply."""
        return self.has_cameras and _cameras(self.train) > 1

    @property
    def has_test_cameras(self) -> bool:
        """Whether query and gallery are of two known cameras or more.

        If not, evaluation must not remove same-camera matches: it would remove all of them.
        """
        return self.has_cameras and _cameras(self.query + self.gallery) > 1

    @property
    def num_cameras(self) -> int:
        """Number of distinct cameras among the training images (1 where cameras are unknown)."""
        return _cameras(self.train)

    def table(self) -> str:
        """The ``subset | # ids | # images | # cameras`` table, one subset a line; "-" marks what is not known."""
        rows = [("subset", "# ids", "# images", "# cameras")]
        test = self.has_test_cameras
        for subset, samples, has_cameras in (
            ("train", self.train, self.has_train_cameras), ("query", self.query, test), ("gallery", self.gallery, test)
        ):  # fmt: skip
            known = {sample.pid for sample in samples if sample.pid >= 0}
            ids = f"{len(known):,}" if known else "-"
            cameras = f"{_cameras(samples):,}" if samples and has_cameras else "-"
            rows.append((subset, ids, f"{len(samples):,}", cameras))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return " | ".join(cells)

        return "\n".join([line(rows[0]), "-+-".join("-" * width for width in widths), *map(line, rows[1:])])


def _cameras(samples: Iterable[Sample]) -> int:
    return len({sample.camid for sample in samples})


def sort_samples(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The canonical order: by path (paths are unique, so pid and camid never decide)."""
    return tuple(sorted(samples))


def relabel(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Replace known pids by 0..n-1 in ascending order of the old pid; -1 (unknown) stays -1."""
    samples = tuple(samples)
    new = {pid: i for i, pid in enumerate(sorted({sample.pid for sample in samples if sample.pid >= 0}))}
    return tuple(sample._replace(pid=new.get(sample.pid, -1)) for sample in samples)


def small_pids(*splits: tuple[Sample, ...]) -> tuple[tuple[Sample, ...], ...]:
    """Test splits with pids that tensors can hold: as they are if all fit 64 bits, else numbered, the same in each."""
    pids = sorted({sample.pid for samples in splits for sample in samples})
    if not pids or (pids[0] >= -_INT64 and pids[-1] < _INT64):
        return splits
    new = {pid: number for number, pid in enumerate(pids)}
    return tuple(tuple(sample._replace(pid=new[sample.pid]) for sample in samples) for samples in splits)

# SPDX-License-Identifier: Apache-2.0
"""``labels.csv``: which images an epoch took for one person, to be looked at beside the images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from fastreid_u.engine.checkpoint import write_whole

if TYPE_CHECKING:
    from fastreid_u.data import Sample


def write_labels(path: Path, samples: "Sequence[Sample]", labels: np.ndarray) -> None:
    """Write path, label and camera of each sample to ``path``, in one step, in the order of ``samples``.

    ``labels`` is (N,), -1 for un-clustered. Paths stand in quotes, so they may hold commas, quotes and line breaks; a
    byte that is not UTF-8 is written as it is.
    """

    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(("path", "label", "camid"))
        writer.writerows(
            (sample.path, label, sample.camid) for sample, label in zip(samples, labels.tolist(), strict=True)
        )
        text.detach()  # flushed; the file stays open

    write_whole(path, write)

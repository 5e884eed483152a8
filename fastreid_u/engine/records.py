# SPDX-License-Identifier: Apache-2.0
"""The records of a run: one dict per epoch, as in ``metrics.jsonl``."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self


class Records(list[dict[str, Any]]):
    """One dict per epoch, in order; epoch -1 is the network before training, if it was evaluated."""

    @property
    def last(self) -> dict[str, Any]:
        """Record of the last epoch; of the network before training where none was trained."""
        return self[-1]

    @property
    def best(self) -> dict[str, Any] | None:
        """Record of the epoch with the highest mAP, the one in ``model_best``; None if nothing was evaluated.

        Of equal ones the first; the network before training does not count.
        """
        return highest_map(record for record in self if record["epoch"] >= 0)

    @property
    def start(self) -> dict[str, Any] | None:
        """Record of the network before training, if it was evaluated and had something to rank."""
        return highest_map(record for record in self if record["epoch"] < 0)

    def to_text(self) -> str:
        """One JSON object a line."""
        return "".join(json.dumps(record) + "\n" for record in self)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The records of a file; a last line that a full disk or a crash has torn is left out.

        Raises:
            FileNotFoundError: no such file. ValueError: another line is not a JSON object.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"train: {path} must be there to go on with its run, got none") from None
        records = cls()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            elif number < len(lines):
                raise ValueError(f"train: line {number} of {path} must be a JSON object, got {line[:60]!r}")
        return records


def highest_map(figures: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of the dicts with the highest "mAP"; None where none has one."""
    ranked = [figure for figure in figures if figure.get("mAP") is not None]
    return max(ranked, key=lambda figure: figure["mAP"], default=None)

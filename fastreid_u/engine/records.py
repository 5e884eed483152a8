# SPDX-License-Identifier: Apache-2.0
"""The records of a run: one dict per epoch, as in ``metrics.jsonl``."""

import json
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any, Self

from fastreid_u.engine.own_file import read_own


class Records(list[dict[str, Any]]):
    """One dict per epoch, in order; epoch -1 is the network before training, if it was evaluated."""

    @property
    def last(self) -> dict[str, Any]:
        """Record of the last epoch; of the network before training where none was trained."""
        return self[-1]

    @property
    def best(self) -> dict[str, Any] | None:
        """Record of the epoch with the highest mAP, the one in ``model_best``; None if nothing was evaluated.

        Of equal ones the first. The network before training does not count, nor do figures on other images than those
        that were ranked first: a run may go on with another gallery, where a higher mAP is not a better network.
        """
        first = next((record["ranked"] for record in self if record.get("ranked")), None)
        return highest_map(record for record in self if record["epoch"] >= 0 and record.get("ranked", first) == first)

    @property
    def start(self) -> dict[str, Any] | None:
        """Record of the network before training, if it was evaluated and had something to rank."""
        return highest_map(record for record in self if record["epoch"] < 0)

    def to_text(self) -> str:
        """One JSON object a line."""
        return "".join(json.dumps(record) + "\n" for record in self)

    def until(self, epoch: int) -> Self:
        """Those of ``epoch`` and earlier ones."""
        return type(self)(record for record in self if record["epoch"] <= epoch)

    def require_each_epoch(self, epoch: int, path: Path) -> None:
        """There is one record of each epoch from 0 to ``epoch``, in order, and none besides; ``path`` holds them.

        Raises:
            ValueError: names the first epoch for which this does not hold.
        """
        found = [record["epoch"] for record in self if record["epoch"] >= 0]
        for number in range(max(epoch + 1, len(found))):
            if found[number : number + 1] != [number] or number > epoch:
                got = f"epoch {found[number]}" if number < len(found) else "none"
                raise ValueError(
                    f"train: {path} must hold a record of each finished epoch, 0 to {epoch}, got {got} in the place of "
                    f"epoch {number}; without them the best network cannot be told. Start another run"
                )

    @classmethod
    def read(cls, path: Path) -> Self:
        """The records of a file; a last line that a full disk or a crash has torn is left out.

        Raises:
            FileNotFoundError: no such file. ValueError: another line is no record, or the file no regular one.
        """
        try:
            lines = read_own(path, "train").decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"train: {path} must be there to go on with its run, got none") from None
        records = cls()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                require_record(record, f"line {number} of {path}")
                records.append(record)
            elif number < len(lines):
                raise ValueError(f"train: line {number} of {path} must be a JSON object, got {line[:60]!r}")
        return records


def require_record(record: object, place: str) -> None:
    """``record``, found in ``place``, is a dict that names its epoch, and its mAP as a number if it has one.

    Raises:
        ValueError: names the entry.
    """
    if not isinstance(record, dict):
        raise ValueError(f"train: {place} must be a JSON object, got {record!r}")
    epoch, figure = record.get("epoch"), record.get("mAP")
    if not isinstance(epoch, int) or isinstance(epoch, bool):
        raise ValueError(f"train: {place} must name its epoch, a whole number, got {epoch!r}")
    if not isinstance(figure, Real | None) or isinstance(figure, bool):
        raise ValueError(f"train: {place} must hold mAP as a number, got {figure!r}")


def highest_map(figures: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of the dicts with the highest "mAP"; None where none has one."""
    ranked = [figure for figure in figures if figure.get("mAP") is not None]
    return max(ranked, key=lambda figure: figure["mAP"], default=None)

# SPDX-License-Identifier: Apache-2.0
"""What a run shows: progress bars on a terminal, plain lines elsewhere, and every line in the run's ``log.txt``."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastreid_u.engine.own_file import open_own

PLAIN_SECONDS = 10.0  # without a terminal, a long phase shows where it is this often


class Display:
    """The lines and the progress of one run.

    Args:
        log: file to which every line is appended, refused if it is a link; without one, lines are kept until ``log_to``
            names it.
        quiet: show nothing on ``stream`` (lines are logged all the same).
        stream: where lines are shown; a terminal gets progress bars.
    """

    def __init__(self, log: Path | None = None, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream or sys.stdout
        self._log = log
        self._kept: list[str] = []  # lines for the log, until there is one
        self._progress = None

    def log_to(self, log: Path) -> None:
        """Append the lines shown so far, and all that follow, to ``log``."""
        self._log = log
        kept, self._kept = self._kept, []
        self._append(kept)

    @property
    def interactive(self) -> bool:
        return not self.quiet and self.stream.isatty()

    def line(self, text: str = "") -> None:
        """Show and log ``text``; characters that cannot be encoded (file names hold any byte) become escapes."""
        self._append([text])
        if self.quiet:
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, errors="backslashreplace").decode(encoding)
        if self._progress is not None:  # above the bar, not through it
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def _append(self, lines: list[str]) -> None:
        if self._log is None:
            self._kept += lines
            return
        with open_own(self._log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(line + "\n" for line in lines)

    @contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Python warnings of the block become lines here, each text once; with ``quiet`` it also goes its usual way."""
        heard: set[str] = set()
        usual = warnings.showwarning

        def show(message, *category_and_place, **more) -> None:  # as ``warnings`` calls it
            if (text := str(message)) not in heard:
                heard.add(text)
                self.line(f"warning: {text}")
                if self.quiet:
                    usual(message, *category_and_place, **more)

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "images") -> Iterator["Phase"]:
        """Progress of ``total`` units of work; call the yielded phase with how many were just done."""
        phase = Phase(self, name, total, unit)
        if not self.interactive:
            yield phase
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(file=self.stream), transient=True) as progress:
            self._progress = progress
            phase.task = progress.add_task(name, total=total, note=unit)
            try:
                yield phase
            finally:
                self._progress = None


class Phase:
    """The moving part of ``Display.phase``."""

    def __init__(self, display: Display, name: str, total: int, unit: str) -> None:
        self.display = display
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self.task = None
        self._spoke = time.monotonic()

    def __call__(self, count: int = 1, note: str = "") -> None:
        self.done += count
        progress = self.display._progress
        if progress is not None:
            progress.update(self.task, completed=self.done, note=note or self.unit)
        elif time.monotonic() - self._spoke >= PLAIN_SECONDS:
            self._spoke = time.monotonic()
            self.display.line(f"  {self.name} {self.done}/{self.total} {self.unit}" + (f"  {note}" if note else ""))

# SPDX-License-Identifier: Apache-2.0
"""Where a run speaks: progress bars on a terminal, plain lines elsewhere, and every line in the run's ``log.txt``."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastreid_u.engine.own_file import open_own

PLAIN_SECONDS = 10.0  # without a terminal, a long phase says where it is this often


class Display:
    """One voice for a run.

    Args:
        log: file that receives every line, appended, and is refused if it is a link; None keeps no log.
        quiet: say nothing on ``stream`` (the log is still written).
        stream: where lines go; a terminal gets progress bars.
    """

    def __init__(self, log: Path | None = None, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.log = log
        self.quiet = quiet
        self.stream = stream or sys.stdout
        self._progress = None

    @property
    def interactive(self) -> bool:
        return not self.quiet and self.stream.isatty()

    def line(self, text: str = "") -> None:
        """Say and log ``text``; characters that cannot be encoded (file names hold any byte) are written as escapes."""
        if self.log is not None:
            with open_own(self.log, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
        if self.quiet:
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, errors="backslashreplace").decode(encoding)
        if self._progress is not None:  # above the bar, not through it
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Python warnings of the block become lines here, each text once; with ``quiet`` it also goes its usual way."""
        heard: set[str] = set()
        usual = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None) -> None:
            if (text := str(message)) not in heard:
                heard.add(text)
                self.line(f"warning: {text}")
                if self.quiet:
                    usual(message, category, filename, lineno, file, line)

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

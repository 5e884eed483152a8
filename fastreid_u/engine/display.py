# SPDX-License-Identifier: Apache-2.0
"""What a run shows: progress bars on a terminal, plain lines elsewhere, and every line in the run's ``log.txt``."""

import codecs
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastreid_u._text import visible
from fastreid_u.engine.own_file import open_own

PLAIN_SECONDS = 10.0  # without a terminal, a long phase shows where it is this often


class Display:
    """The lines and the progress of one run.

    Args:
        log: file to which every line is appended, refused if it is a link; None keeps lines until ``log_to`` names it.
        quiet: show nothing on ``stream`` (lines are logged all the same).
        stream: where lines are shown, standard output by default; a terminal gets progress bars. Where there is none
            (a service, ``>&-``), or it has been closed, nothing is shown.
    """

    def __init__(self, log: Path | None = None, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = sys.stdout if stream is None else stream
        self._log = log
        self._kept: list[str] = []  # lines for the log, until there is one
        self._progress = None
        self._shown_once: set[str] = set()

    def log_to(self, log: Path) -> None:
        """Append the lines shown so far, and all that follow, to ``log``.

        Raises:
            PermissionError: ``log`` is a link or a device. OSError: it cannot be written.
        """
        self._log = log
        kept, self._kept = self._kept, []
        self._append(kept)

    @property
    def interactive(self) -> bool:
        return not self.quiet and _is_terminal(self.stream)

    def line(self, text: str = "") -> None:
        """Show and log ``text``; what would act on a terminal or cannot be encoded (file names hold any byte) becomes
        escapes."""
        text = visible(text)
        self._append([text])
        if self.quiet or self.stream is None or getattr(self.stream, "closed", False):
            return
        text = _encodable(text, self.stream)
        if self._progress is not None:  # above the bar, not through it
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        try:
            print(text, file=self.stream, flush=hasattr(self.stream, "flush"))
        except OSError as error:  # a full device, say; a run goes on with its log
            if isinstance(error, BrokenPipeError) or self._log is None:
                raise
            self.stream = None
            self.line(f"note: nothing more is shown on standard output: {error.strerror or error}")

    def once(self, text: str) -> None:
        """``line``, unless ``text`` went this way before."""
        if text not in self._shown_once:
            self._shown_once.add(text)
            self.line(text)

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
                for line in f"warning: {text}".split("\n"):
                    self.line(line)
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


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream, or one that cannot tell; a closed one
        return False


def _encodable(text: str, stream: TextIO) -> str:
    """``text`` with escapes for what ``stream`` has no bytes for."""
    try:
        encoding = codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name
    except (LookupError, TypeError):  # a stream of one's own, with a name that Python does not know
        encoding = "ascii"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


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

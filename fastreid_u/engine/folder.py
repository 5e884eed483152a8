# SPDX-License-Identifier: Apache-2.0
"""A run on disk. ``RunFolder`` alone knows what a run folder holds and what its files are called:

    config.toml                    what was asked for, with the folder's layout and the versions in use
    log.txt  metrics.jsonl         every line shown; one JSON object per epoch
    model_last.safetensors .json   the network after the last finished epoch
    model_best.safetensors .json   the network with the best mAP so far, where there is something to rank
    state.safetensors              all that resuming needs, in ONE file, so that no crash can leave it half new
    labels.csv                     the pseudo-label of each training image in the last epoch
    curves.png

While a run writes, ``.lock`` lies there too. Every file is whole or absent (checkpoint.py). Nothing that a folder names
is run, and no link in it is written through.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import nn

from fastreid_u._toml import dump_toml, load_toml
from fastreid_u.engine.checkpoint import SaveError, flush, partial_name, write_described, write_text
from fastreid_u.engine.layout import LAYOUT, require_readable
from fastreid_u.engine.lock import FolderInUse, locked
from fastreid_u.engine.own_file import open_own, read_own
from fastreid_u.engine.records import Records
from fastreid_u.engine.state import State, read_state, write_state

RUNS = Path("runs")  # where a run without a folder of its own is put

_NEEDED = ("method", "dataset", "root")  # of the [run] table; each is text, as "source_root" is where it is there


class RunFolder:
    """The folder of one run, which need not exist yet.

    Args:
        path: the folder; "~" is the user's home.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path).expanduser()
        self._settings = ""  # the text of config.toml, once this run has written it

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def all_unnamed(cls) -> list[Self]:
        """The folders below ./runs, where runs without a folder of their own are put."""
        return [cls(path) for path in RUNS.glob("*")]

    # What the files are called

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def labels(self) -> Path:
        return self.path / "labels.csv"

    @property
    def state_file(self) -> Path:
        return self.path / "state.safetensors"

    def model_file(self, which: str) -> Path:
        """The network after the "last" finished epoch or after the "best"."""
        return self.path / f"model_{which}.safetensors"

    def model_text(self, which: str) -> Path:
        """The description of ``model_file``, for people."""
        return self.path / f"model_{which}.json"

    def files(self) -> list[Path]:
        """Every file that a run may leave, whether it is there or not."""
        models = [make(which) for which in ("last", "best") for make in (self.model_file, self.model_text)]
        return [self.config, self.log, self.metrics, self.state_file, self.curves, self.labels, *models]

    # What there is

    @property
    def holds_run(self) -> bool:
        return any(file.exists() for file in (self.config, self.metrics, self.state_file))

    @property
    def has_settings(self) -> bool:
        return self.config.exists()

    @property
    def finished_at(self) -> int | None:
        """When the last finished epoch was saved, in nanoseconds since 1970; None without a finished epoch."""
        try:
            return self.state_file.stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None

    def settings(self, op: str = "train") -> dict[str, dict[str, Any]]:
        """The tables of ``config.toml``: run, config, data and source_data.

        Raises:
            LayoutError: a newer version wrote them.
            ValueError: ``train`` did not write them; messages begin with ``op``.
        """
        try:
            text = read_own(self.config, op).decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            raise FileNotFoundError(f"{op}: {self.config} must be there, with the run's settings, got none") from None
        try:
            tables = load_toml(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{op}: {self.config} must be as train wrote it, got {error}") from error
        tables = {name: table for name, table in tables.items() if isinstance(table, dict)}
        run = tables.get("run", {})
        require_readable(op, self.path, run.get("layout", 3))
        missing = {"run", "config", "data", "source_data"} - tables.keys() | set(_NEEDED) - run.keys()
        if missing:
            raise ValueError(f"{op}: {self.config} must be as train wrote it, got no {', '.join(sorted(missing))}")
        for table, name, value in ((table, *item) for table, values in tables.items() for item in values.items()):
            wants_text = table == "run" and name in (*_NEEDED, "source_root")
            if not isinstance(value, str if wants_text else str | int | float):
                rule = "text" if wants_text else "text, a number, true or false"
                raise ValueError(f"{op}: {self.config} must hold {table}.{name} as {rule}, got {value!r}")
        return tables

    @cached_property
    def records(self) -> Records:
        """One record per epoch; read when first asked for, then kept in step with ``metrics.jsonl``."""
        return Records.read(self.metrics)

    def state(self) -> State:
        """What the last finished epoch left; raises as ``read_state``."""
        return read_state(self.state_file)

    # Whether a run may begin here

    def refuse_taken(self, *, overwrite: bool) -> None:
        """A run is replaced only where ``overwrite`` asks for it.

        Raises:
            FileExistsError: the folder holds a run.
        """
        if self.holds_run and not overwrite:
            finished = self.finished_at is not None
            raise FileExistsError(
                f"train: {self.path} already holds a run{'' if finished else ' without a finished epoch'}; pass "
                + ("resume=True (--resume) to go on with it, " if finished else "")
                + "overwrite=True (--overwrite) to replace it, or another logs_dir"
            )

    def require_finished_epoch(self) -> None:
        """There is something to go on from.

        Raises:
            FileNotFoundError: there is not.
        """
        if self.finished_at is None:
            raise FileNotFoundError(
                f"train: resume must name a folder with a finished epoch, got {self.path} (no {self.state_file.name})"
            )

    @contextmanager
    def locked(self) -> Iterator[Self]:
        """Make the folder if it is not there, and keep other runs out of it for as long as the block lasts.

        Raises:
            FolderInUse: another run writes here. PermissionError: the folder cannot be made or written in.
            NotADirectoryError: there is a file in its place.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"train: logs_dir must be a folder, got the file {self.path}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(f"train: cannot write in run folder {self.path}: {error}") from error
        with locked(self.path):
            yield self

    @classmethod
    @contextmanager
    def locked_free(cls, name: str) -> Iterator[Self]:
        """The first of ``name``, ``name-2``, ... below ./runs that holds no run and in which none begins; locked."""
        for number in itertools.count(1):
            folder = cls(RUNS / (name if number == 1 else f"{name}-{number}"))
            if folder.holds_run:
                continue
            with ExitStack() as stack:
                try:
                    stack.enter_context(folder.locked())
                except FolderInUse:
                    continue
                if not folder.holds_run:
                    yield folder
                    return

    # Writing

    def clean(self, *, run: bool) -> None:
        """Remove what killed processes have left half written and, with ``run``, the run itself.

        Raises:
            IsADirectoryError: a folder has the name of one of the run's files.
        """
        for path in self.files():
            if path.is_dir() and not path.is_symlink():
                raise IsADirectoryError(f"train: {path} must be a file, got a folder")
        half = "|".join(re.escape(partial_name(file, "PID").name).replace("PID", r"\d+") for file in self.files())
        found = [path for path in self.path.iterdir() if re.fullmatch(half, path.name)]
        for path in [*found, *(self.files() if run else ())]:
            if path.is_symlink() or not path.is_dir():  # what is a folder is not ours
                path.unlink(missing_ok=True)

    def begin(self, settings: str) -> None:
        """Start a run without records, with ``settings`` as ``settings_text`` makes them."""
        self.records = Records()
        self.write_settings(settings)

    def write_settings(self, settings: str) -> None:
        self._settings = settings
        write_text(self.config, settings)

    def go_on_after(self, epoch: int, kept: Records | None = None) -> bool:
        """Drop the records of later epochs.

        ``kept`` are those that the state holds: they take the place of what ``metrics.jsonl`` has lost, or of what has
        been changed there. Returns whether anything was.

        Raises:
            ValueError: not every epoch until ``epoch`` has a record.
        """
        found = self.records.until(epoch)
        self.records = found if kept is None else kept
        self.records.require_each_epoch(epoch, self.metrics if kept is None else self.state_file)
        write_text(self.metrics, self.records.to_text())
        return self.records.to_text() != found.to_text()

    def add_record(self, record: dict[str, Any]) -> None:
        """Append to the records."""
        self.records.append(record)
        try:
            with open_own(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                flush(file)
        except OSError as error:
            raise SaveError(f"cannot write {self.metrics}: {error}") from error

    def save_epoch(self, record: dict[str, Any], network: nn.Module, about: Mapping[str, Any], state: State) -> None:
        """Save a finished epoch: its record, ``network`` with its description ``about``, and ``state``.

        ``state``, with the records and the settings, goes last: an epoch counts as finished once all else of it is on
        disk.
        """
        self.add_record(record)
        best = record is self.records.best
        about = {"schema": LAYOUT, **about}
        for which in ("last", "best") if best else ("last",):
            write_described(self.model_file(which), network.state_dict(), about)
            write_text(self.model_text(which), json.dumps(about, indent=2) + "\n")
        write_state(self.state_file, state._replace(settings=self._settings, records=self.records))


def settings_text(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """``config.toml`` of ``tables``, numbered with this version's layout.

    Raises:
        TypeError: a value cannot be saved.
    """
    return dump_toml({**tables, "run": {**tables["run"], "layout": LAYOUT}})

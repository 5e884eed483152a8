# SPDX-License-Identifier: Apache-2.0
"""A run on disk. ``RunFolder`` alone knows what a run folder holds and what its files are called:

    config.toml                    what was asked for, with the folder's layout and the versions in use
    log.txt  metrics.jsonl         every line shown; one JSON object per epoch
    model_last.safetensors .json   the network after the last finished epoch
    model_best.safetensors .json   the network with the best mAP so far, where there is something to rank
    state.safetensors              all that resuming needs, in ONE file, so that no crash can leave it half new
    labels.csv                     the pseudo-label of each training image in the last epoch
    curves.png

While a run writes, ``.lock`` lies there too. Every file is whole or absent (checkpoint.py).
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from fastreid_u._toml import dump_toml, load_toml
from fastreid_u.engine.checkpoint import SaveError, read_described, write_described, write_text
from fastreid_u.engine.lock import FolderInUse, locked
from fastreid_u.engine.own_file import open_own
from fastreid_u.engine.records import Records

# The number of this form of a run folder, in config.toml, in the state and in the models. It rises when a version
# writes what older ones would misread. Layout 3 has no number in config.toml.
LAYOUT = 4
READABLE_LAYOUTS = (3, 4)

RUNS = Path("runs")  # where a run without a folder of its own is put


class LayoutError(ValueError):
    """The run folder was written by a version that keeps runs in another form."""


class State(NamedTuple):
    """What a run goes on from.

    Attributes:
        epoch: the last finished epoch.
        fingerprint: of the training images, as ``fingerprint`` in datasets.py makes it.
        tensors: the recipe's, the optimiser's, labels, and which images could be read, by name.
        layout: of the version that wrote it.
    """

    epoch: int
    fingerprint: str
    tensors: dict[str, Tensor]
    layout: int = LAYOUT


class RunFolder:
    """The folder of one run, which need not exist yet.

    Args:
        path: the folder; "~" is the user's home.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path).expanduser()

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
            tables = load_toml(self.config.read_text(encoding="utf-8", errors="surrogateescape"))
        except ValueError as error:  # not TOML, or not text
            raise ValueError(f"{op}: {self.config} must be as train wrote it, got {error}") from error
        tables = {name: table for name, table in tables.items() if isinstance(table, dict)}
        run = tables.get("run", {})
        require_readable(op, self.path, run.get("layout", 3))
        missing = {"run", "config", "data", "source_data"} - tables.keys() | {"method", "dataset", "root"} - run.keys()
        if missing:
            raise ValueError(f"{op}: {self.config} must be as train wrote it, got no {', '.join(sorted(missing))}")
        return tables

    @cached_property
    def records(self) -> Records:
        """One record per epoch; read when first asked for, then kept in step with ``metrics.jsonl``."""
        return Records.read(self.metrics)

    def state(self) -> State:
        """What the last finished epoch left.

        Raises:
            LayoutError: another version wrote it. ValueError: the file is torn, or ``train`` did not write it.
        """
        tensors, about = read_described(self.state_file)
        about = about if isinstance(about, dict) else {}
        if "schema" in about:
            require_readable("train", self.path, about["schema"])
        missing = {"schema", "epoch", "data"} - about.keys() | {"labels"} - tensors.keys()
        if missing:
            raise ValueError(f"train: {self.state_file} must be as train wrote it, got no {', '.join(sorted(missing))}")
        return State(about["epoch"], about["data"], tensors, about["schema"])

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
        """
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
        """Remove what killed processes have left half written and, with ``run``, the run itself."""
        for path in [*self.path.glob(".*.part"), *(self.files() if run else ())]:
            path.unlink(missing_ok=True)

    def begin(self, settings: str) -> None:
        """Start a run without records, with ``settings`` as ``settings_text`` makes them."""
        self.records = Records()
        self.write_settings(settings)

    def write_settings(self, settings: str) -> None:
        write_text(self.config, settings)

    def go_on_after(self, epoch: int) -> None:
        """Drop the records of later epochs."""
        self.records = Records(record for record in self.records if record["epoch"] <= epoch)
        write_text(self.metrics, self.records.to_text())

    def add_record(self, record: dict[str, Any]) -> None:
        """Append to the records."""
        self.records.append(record)
        try:
            with open_own(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise SaveError(f"cannot write {self.metrics}: {error}") from error

    def save_epoch(self, record: dict[str, Any], network: nn.Module, about: Mapping[str, Any], state: State) -> None:
        """Save a finished epoch: its record, ``network`` with its description ``about``, and ``state``.

        ``state`` goes last: an epoch counts as finished once all else of it is on disk.
        """
        self.add_record(record)
        best = record is self.records.best
        about = {"schema": LAYOUT, **about}
        for which in ("last", "best") if best else ("last",):
            write_described(self.model_file(which), network.state_dict(), about)
            write_text(self.model_text(which), json.dumps(about, indent=2) + "\n")
        header = {"schema": LAYOUT, "epoch": state.epoch, "data": state.fingerprint}
        write_described(self.state_file, state.tensors, header)


def require_readable(op: str, path: Path, layout: object) -> None:
    """Refuse what is of another ``layout`` than this version reads.

    Raises:
        LayoutError: names the layout, and what to do.
    """
    if layout in READABLE_LAYOUTS:
        return
    newer = not isinstance(layout, int) or layout > LAYOUT
    raise LayoutError(
        f"{op}: {path} must have run layout {' or '.join(map(str, READABLE_LAYOUTS))} for this version, got layout "
        f"{layout!r} of {'a newer' if newer else 'an older'} fastreid_u; use that version for it, or start another run "
        "in another logs_dir"
    )


def settings_text(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """``config.toml`` of ``tables``, numbered with this version's layout.

    Raises:
        TypeError: a value cannot be saved.
    """
    return dump_toml({**tables, "run": {**tables["run"], "layout": LAYOUT}})

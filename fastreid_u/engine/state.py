# SPDX-License-Identifier: Apache-2.0
"""``state.safetensors``: all that a run goes on from, in one file with a checksum."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastreid_u.engine.checkpoint import CHECKSUM, description, read_tensors, write_described
from fastreid_u.engine.layout import LAYOUT, require_readable
from fastreid_u.engine.records import Records, require_record


class State(NamedTuple):
    """What a run goes on from.

    Attributes:
        epoch: the last finished epoch.
        fingerprint: of the training images, as ``fingerprint`` in datasets.py makes it.
        tensors: the recipe's, the optimiser's, labels, and which images could be read, by name.
        layout: of the version that wrote it.
        surroundings: what else should be the same when the run goes on, by name (surroundings.py).
        settings: the text of ``config.toml``.
        records: of the epochs so far, as in ``metrics.jsonl``. None in a state of a version that kept neither
            checksum nor records, settings and surroundings in it.
    """

    epoch: int
    fingerprint: str
    tensors: dict[str, Tensor]
    layout: int = LAYOUT
    surroundings: Mapping[str, str] = {}
    settings: str = ""
    records: Records | None = None


def write_state(path: Path, state: State) -> None:
    header = {
        "schema": LAYOUT, "epoch": state.epoch, "data": state.fingerprint, "surroundings": dict(state.surroundings),
        "settings": state.settings, "records": list(state.records or ()),
    }  # fmt: skip
    write_described(path, state.tensors, header)


def read_state(path: Path) -> State:
    """The state in a file.

    Raises:
        LayoutError: another version wrote it. ValueError: the file is torn or damaged, or ``train`` did not write it.
    """
    tensors, metadata = read_tensors(path, "train")
    about = description(metadata, path, "train")
    if "schema" in about:
        require_readable("train", path.parent, about["schema"])
    missing = {"schema", "epoch", "data"} - about.keys() | {"labels"} - tensors.keys()
    if "records" in about:
        missing |= {"surroundings", "settings"} - about.keys() | {CHECKSUM} - metadata.keys()
    if missing:
        raise ValueError(f"train: {path} must be as train wrote it, got no {', '.join(sorted(missing))}")
    for name, rule, holds in _RULES:
        if name in about and not holds(about[name]):
            raise ValueError(f"train: {path} must hold {name} as {rule}, got {about[name]!r}")
    known = State(about["epoch"], about["data"], tensors, about["schema"])
    if "records" not in about:
        return known
    for record in about["records"]:
        require_record(record, f"each record in {path}")
    return known._replace(
        surroundings=about["surroundings"], settings=about["settings"], records=Records(about["records"])
    )


def _is_epoch(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= -1


_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("epoch", "a whole number from -1", _is_epoch),
    ("data", "text", lambda value: isinstance(value, str)),
    ("surroundings", "a table of texts", lambda value: isinstance(value, dict)),
    ("settings", "text", lambda value: isinstance(value, str)),
    ("records", "a list", lambda value: isinstance(value, list)),
)

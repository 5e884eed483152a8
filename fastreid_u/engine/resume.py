# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: what it was told, whether the data are still its own, and where it stopped."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastreid_u.config import Config, load_toml, plain
from fastreid_u.engine import checkpoint
from fastreid_u.engine.loop import Session
from fastreid_u.methods import method_names
from fastreid_u.recipe import Recipe

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset

# A resumed run may be given these anew; anything else would make it another experiment.
_RESUMABLE = {"epochs", "workers", "cache_images", "print_freq", "eval_step", "eval_batch_size"}


def stored_tables(op: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The run's ``config.toml``.

    Raises:
        ValueError: it is not one that ``train`` wrote; the message begins with ``op``.
    """
    path = folder / "config.toml"
    try:
        tables = load_toml(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError as error:  # not TOML, or not text
        raise ValueError(f"{op}: {path} must be as train wrote it, got {error}") from error
    missing = {"run", "config", "data", "source_data"} - tables.keys() | {"method", "dataset", "root"} - tables.get(
        "run", {}
    ).keys()
    if missing:
        raise ValueError(f"{op}: {path} must be as train wrote it, got no {', '.join(sorted(missing))}")
    return tables


def stored_method(tables: Mapping[str, Any]) -> str:
    """The run's method, where it is one of ours. A stored file or module is never imported: the folder may be anyone's.

    Raises:
        ValueError: it is not, so the caller has to give it again.
    """
    method = tables["run"]["method"]
    if method not in method_names():
        raise ValueError(
            "train: method must be given again, as FILE.py:CLASS or the class, for a run of one's own method "
            f"({method!r}), got None"
        )
    return method


def refuse_import(op: str, path: Path, method: Any) -> None:
    """``train`` stores the name of a method. A file or module to import in its place was written by someone else."""
    if not isinstance(method, str) or ":" in method:
        raise ValueError(f"{op}: {path} must hold the name of a method, as train wrote it, got {method!r}")


def place(name: str, root: str | None) -> str | None:
    """The ``root`` with which ``load_dataset(name, root)`` finds again what it found in ``root``.

    None, the usual places, where the data have moved, and for folders and files, whose name is their path.
    """
    from fastreid_u.data import known_name

    known = known_name(name)
    if known is None or root is None:
        return None
    root = os.path.dirname(root) if known == "synthetic" else root  # "synthetic" takes the folder above its renderings
    return root if os.path.isdir(root) else None


def stored_config(tables: Mapping[str, Any], recipe_class: type[Recipe], overrides: Mapping[str, Any]) -> Config:
    """The run's settings, with what a resumed run may change changed."""
    if tables["run"]["method"] != recipe_class.name:
        raise ValueError(f"train: method must be the run's own ({tables['run']['method']}), got {recipe_class.name!r}")
    names = [field.name for field in dataclasses.fields(recipe_class.Config)]
    values = {name: tables["config"].get(name) for name in names}  # None is written as a comment, hence absent
    overrides = {name: plain(value) for name, value in overrides.items()}
    changed = {k: v for k, v in overrides.items() if k not in _RESUMABLE and values.get(k) != v}
    if changed:
        raise ValueError(
            f"train: a resumed run must keep its settings (only {', '.join(sorted(_RESUMABLE))} may change), got "
            + ", ".join(f"{k}={v!r} instead of {values.get(k)!r}" for k, v in changed.items())
        )
    return recipe_class.Config.for_dataset("", **{**values, **overrides})


def fingerprint(*sets: "ReIDDataset | None") -> str:
    """A digest of the training images: their paths below the root, sizes in bytes, identities and cameras."""
    digest = hashlib.sha256()
    for reid in sets:
        for sample in reid.train if reid else ():
            try:
                size = os.stat(sample.path).st_size
            except OSError:
                size = -1  # not readable now; the loader will say so
            name = os.path.relpath(sample.path, reid.root)
            digest.update(f"{name}\0{size}\0{sample.pid}\0{sample.camid}\n".encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def restore(session: Session) -> None:
    """Bring ``session`` to the end of its last finished epoch; later lines of metrics.jsonl are dropped."""
    tensors, about = checkpoint.read_state(session.folder)
    count = len(session.dataset.train)
    if len(tensors["labels"]) != count or about["data"] != session.data:
        raise ValueError(
            f"train: the data must be the run's own, got others in {session.dataset.root}: {count} training images, "
            f"the run has {len(tensors['labels'])}"
            + (", with other names, sizes, identities or cameras" if len(tensors["labels"]) == count else "")
        )
    own = checkpoint.load_state(tensors, session.recipe, session.optimizer)
    session.labels = own["labels"].numpy()
    session.recipe.images.readable = own["readable"]
    session.start = about["epoch"] + 1
    session.records = [r for r in _records(session.folder / "metrics.jsonl") if r["epoch"] < session.start]
    checkpoint.write_text(session.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in session.records))
    session.display.line(f"resumed after epoch {about['epoch']}")


def _records(path: Path) -> list[dict[str, Any]]:
    """The file's records; a last line that a full disk or a crash has torn is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"train: {path} must be there to go on with its run, got none") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"train: line {number} of {path} must be a JSON object, got {line[:60]!r}") from error
    return records

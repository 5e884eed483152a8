# SPDX-License-Identifier: Apache-2.0
"""A run on disk. Every file is whole or absent: written beside its place, flushed, then renamed over it.

    config.toml                    what the run was told
    log.txt  metrics.jsonl         what it said, one JSON object per epoch
    model_last.safetensors .json   the network after the last finished epoch
    model_best.safetensors .json   the network with the best mAP so far, where there is something to rank
    state.safetensors              all that resuming needs, in ONE file, so that no crash can leave it half new
    curves.png

No pickle anywhere: tensors in safetensors, the rest as JSON text (in a safetensors header for ``state``).
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = 4  # 3: networks and what else a method kept, apart from each other


class SaveError(OSError):
    """A file of the run could not be written; what was there before is untouched."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, then put it in ``path``'s place in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask gives; safetensors gives its files to their owner alone
        write(partial)
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}; what was there before is intact") from error
    finally:
        with contextlib.suppress(OSError):  # nothing to remove where all went well
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="surrogateescape"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # safetensors wraps the system's error, "no space left" among them
            raise OSError(str(error)) from error

    write_whole(path, write)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and the header's metadata; a file that is torn or foreign is refused by name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def save_model(folder: Path, name: str, model: torch.nn.Module, about: dict[str, Any]) -> None:
    """``name``.safetensors (weights and, in its header, ``about``) and ``name``.json (``about`` for people)."""
    about = {"schema": SCHEMA, **about}
    write_tensors(folder / f"{name}.safetensors", model.state_dict(), {"fastreid_u": json.dumps(about)})
    write_text(folder / f"{name}.json", json.dumps(about, indent=2) + "\n")


def load_model_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description of a file that ``save_model`` wrote."""
    tensors, metadata = read_tensors(path)
    if "fastreid_u" not in metadata:
        raise ValueError(f"{path} holds no fastreid_u model: its header has no 'fastreid_u' entry")
    return tensors, json.loads(metadata["fastreid_u"])


def save_state(
    folder: Path,
    recipe: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch_tensors: dict[str, Tensor],
    about: dict[str, Any],
) -> None:
    """``state.safetensors``: all of the recipe, the optimiser's moments, and the engine's own tensors of the epoch."""
    tensors = {f"recipe.{name}": tensor for name, tensor in recipe.state_dict().items()} | epoch_tensors
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    write_tensors(folder / "state.safetensors", tensors, {"fastreid_u": json.dumps({"schema": SCHEMA, **about})})


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of the last finished epoch."""
    tensors, about = load_model_file(folder / "state.safetensors")
    if about["schema"] != SCHEMA:
        raise ValueError(f"{folder}: state has schema {about['schema']}, this version reads {SCHEMA}")
    return tensors, about


def load_state(
    tensors: dict[str, Tensor], recipe: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Restore ``recipe`` and ``optimizer`` from ``read_state``'s tensors; returns the engine's own."""
    own: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group == "optimizer":
            index, _, key = rest.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        elif group == "recipe":
            state[rest] = tensor
        else:
            own[name] = tensor
    recipe.load_state_dict(state)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return own


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", "state.safetensors"))


def refuse_taken(folder: Path, *, overwrite: bool) -> None:
    """A folder that holds a run is nobody's to write in unless told."""
    if holds_run(folder) and not overwrite:
        finished = (folder / "state.safetensors").exists()
        raise FileExistsError(
            f"train: {folder} already holds a run{'' if finished else ' without a finished epoch'}; pass "
            + ("resume=True (--resume) to go on with it, " if finished else "")
            + "overwrite=True (--overwrite) to replace it, or another logs_dir"
        )


RUN_FILES = (
    "config.toml", "log.txt", "metrics.jsonl", "state.safetensors", "curves.png",
    "model_last.safetensors", "model_last.json", "model_best.safetensors", "model_best.json",
)  # fmt: skip


def require_resumable(folder: Path, *, overwrite: bool) -> None:
    """There is a finished epoch to go on from."""
    if overwrite:
        raise ValueError("train: resume and overwrite must not both be true, got True and True")
    if not (folder / "state.safetensors").exists():
        raise FileNotFoundError(
            f"train: resume must name a folder with a finished epoch, got {folder} (no state.safetensors)"
        )


def make_folder(folder: Path) -> None:
    """``folder`` is there, or an error says why not; whether it can be written in shows when it is claimed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"train: cannot write in run folder {folder}: {error}") from error


def sweep(folder: Path, *, run: bool) -> None:
    """Remove the debris of killed processes and, with ``run``, the run itself."""
    for path in [*folder.glob(".*.part"), *(folder / name for name in RUN_FILES if run)]:
        path.unlink(missing_ok=True)

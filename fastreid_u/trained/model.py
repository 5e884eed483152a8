# SPDX-License-Identifier: Apache-2.0
"""A trained network, loaded from its run or its file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u._default_device import on_cpu
from fastreid_u.engine.checkpoint import read_described
from fastreid_u.engine.device import pick_device
from fastreid_u.engine.folder import LAYOUT, LayoutError, RunFolder
from fastreid_u.engine.image_set import Reading

if TYPE_CHECKING:
    from fastreid_u.models import ReIDModel

# What a model's header must hold for the network to be built and given images.
_NEEDED = (
    "arch", "pooling_type", "stem_relu", "height", "width", "pixel_norm", "channels_last", "amp", "ap",
    "eval_batch_size",
)  # fmt: skip


@on_cpu()
def load_model(
    run: str | os.PathLike, *, which: str = "last", device: str | torch.device | None = "cpu"
) -> "tuple[ReIDModel, dict[str, Any]]":
    """The network of a run folder (``which`` = "last" or "best") or of a ``model_*.safetensors`` file, and what it is.

    The description holds method, data set, epoch, mAP and the whole config. The network is float32, in eval mode, and
    maps (B, 3, height, width) normalised images to (B, D) unit features. No pickle is read.

    Raises:
        FileNotFoundError: no such folder or file.
        LayoutError: a newer version wrote the model.
        ValueError: not a model that a run wrote, or no such device.
    """
    from fastreid_u.models import build_model

    if which not in ("last", "best"):
        raise ValueError(f"load_model: which must be 'last' or 'best', got {which!r}")
    path = run_path("load_model", run)
    device = pick_device("load_model", device)
    if path.is_dir():
        path = RunFolder(path).model_file(which)
    if not path.exists():
        raise FileNotFoundError(f"load_model: run must be a run folder or a model file, got {run} (no {path})")
    try:
        tensors, about = read_described(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"load_model: {path} must be described by JSON in its header, got {error}") from error
    about = about if isinstance(about, dict) else {}
    layout = about.get("schema", LAYOUT)
    if not isinstance(layout, int) or layout > LAYOUT:
        raise LayoutError(
            f"load_model: {path} must have run layout {LAYOUT} or an older one, got layout {layout!r} of a newer "
            "fastreid_u; load it with that version"
        )
    config = about.get("config")
    missing = [name for name in _NEEDED if not isinstance(config, dict) or name not in config]
    if missing:
        raise ValueError(f"load_model: {path} must describe its network in its header, got no {', '.join(missing)}")
    refuse_import("load_model", path, about.get("method", ""))
    with torch.inference_mode(False):  # else a network loaded under inference_mode could never be trained
        model = build_model(
            config["arch"], pooling=config["pooling_type"], weights=None, stem_relu=config["stem_relu"],
            image_size=(config["height"], config["width"]),
        )  # fmt: skip
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"load_model: {path} must hold the weights of {config['arch']}, got {error}") from error
        # As in training, so that figures are equal to the bit.
        memory_format = torch.channels_last if config["channels_last"] else torch.contiguous_format
        model = model.to(device, torch.float32, memory_format=memory_format)
    return model.eval(), about


def refuse_import(op: str, path: Path, method: Any) -> None:
    """``train`` stores the name of a method; a file or module to import in its place was written by someone else.

    Raises:
        ValueError: ``method`` is no name; the message begins with ``op`` and names the file at ``path``.
    """
    if not isinstance(method, str) or ":" in method:
        raise ValueError(f"{op}: {path} must hold the name of a method, as train wrote it, got {method!r}")


def run_path(op: str, run: str | os.PathLike) -> Path:
    """``run`` as a path, "~" being the user's home.

    Raises:
        TypeError: it is no path; the message begins with ``op``.
    """
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"{op}: run must be a path, got {run!r}")
    return Path(run).expanduser()


def reading_of(config: Mapping[str, Any], **changes: Any) -> Reading:
    """How images are read for a network with the settings ``config``; ``changes`` are ``Reading``'s, None = its own."""
    from fastreid_u.data import test_transform

    view = test_transform(config["height"], config["width"], pixel_norm=config["pixel_norm"])
    own = {"batch_size": config["eval_batch_size"], "truncated": config.get("truncated_images", False)}
    return Reading(view, **own | {name: value for name, value in changes.items() if value is not None})

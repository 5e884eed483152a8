# SPDX-License-Identifier: Apache-2.0
"""A trained network, loaded from its run or its file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u._default_device import on_cpu
from fastreid_u.config import Config
from fastreid_u.engine.arguments import stored_method
from fastreid_u.engine.checkpoint import read_described
from fastreid_u.engine.device import pick_device
from fastreid_u.engine.finite import wrong_weight
from fastreid_u.engine.folder import RunFolder
from fastreid_u.engine.image_set import Reading
from fastreid_u.engine.layout import LAYOUT, LayoutError
from fastreid_u.engine.network_settings import fitted_to_network
from fastreid_u.engine.session import build_network
from fastreid_u.engine.speed import feature_batch, fitted_to_machine

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
    try:
        tensors, about = read_described(path, "load_model")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"load_model: run must be a run folder or a model file, got {run} (no {path})"
        ) from None
    config = _checked(path, about)
    with torch.inference_mode(False):  # else a network loaded under inference_mode could never be trained
        model = build_model(
            config["arch"], pooling=config["pooling_type"], weights=None, stem_relu=config["stem_relu"],
            image_size=(config["height"], config["width"]),
        )  # fmt: skip
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"load_model: {path} must hold the weights of {config['arch']}, got {error}") from error
        if wrong := wrong_weight(model):
            raise ValueError(f"load_model: {path} must hold finite weights, got NaN or infinity in {wrong}")
        # As in training, so that figures are equal to the bit.
        memory_format = torch.channels_last if config["channels_last"] else torch.contiguous_format
        model = model.to(device, torch.float32, memory_format=memory_format)
    return model.eval(), about


@dataclass(frozen=True)
class Choice:
    """Which network is meant, and in which precision it looks at images.

    Attributes:
        arch: a network without a run, by the name that ``train`` takes; None for that of a run.
        settings: settings of ``train`` for a network without a run.
        which: "last" or "best", of a run.
        amp: "off", "bf16" or "auto"; None for the run's own, or "off".
    """

    arch: str | None
    settings: Mapping[str, Any]
    which: str
    amp: str | None


# Settings that a network without a run may be given: they decide what it is, and how it is shown images.
_SETTINGS = ("height", "width", "pooling_type", "stem_relu", "pixel_norm", "channels_last", "seed")


def network_and_config(
    op: str, run: str | os.PathLike | None, choice: Choice, device: torch.device
) -> "tuple[ReIDModel, dict[str, Any]]":
    """The network of ``run``, or that of ``choice.arch`` with the weights ``run``, and its config.

    Raises:
        TypeError: settings of a network beside a run, which has its own. ValueError: a value out of range.
        Also what ``load_model`` and ``build_model`` raise.
    """
    unknown = [name for name in choice.settings if choice.arch is None or name not in _SETTINGS]
    if unknown:
        rule = f"one of {', '.join(_SETTINGS)}" if choice.arch else "left out without arch, since a run has its own"
        raise TypeError(f"{op}: {unknown[0]} must be {rule}, got {choice.settings[unknown[0]]!r}")
    amp = {} if choice.amp is None else {"amp": choice.amp}
    if choice.arch is None:
        Config(**amp)  # refuses what is no precision
        model, about = load_model(run, which=choice.which, device=device)
        return model, {**about["config"], **amp}
    weights = None if run is None else os.fspath(run)
    given = {"arch": choice.arch, "weights": weights, **choice.settings}
    config = fitted_to_machine(fitted_to_network(Config(**given, **amp), given), device)
    with torch.inference_mode(False):
        return build_network(config, device, trained=False).eval(), config.to_dict()


def _checked(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The config in ``about``, the description of the model at ``path``, by the rules that hold where it is written.

    Raises:
        LayoutError: another version wrote the model. ValueError: the description lacks a setting, or breaks a rule.
    """
    layout = about.get("schema", LAYOUT)
    if isinstance(layout, bool) or layout not in range(1, LAYOUT + 1):
        newer = not isinstance(layout, int) or layout > LAYOUT
        raise LayoutError(
            f"load_model: {path} must have run layout {LAYOUT} or an older one, got layout {layout!r} of "
            + ("a newer fastreid_u; load it with that version" if newer else "no fastreid_u")
        )
    config = about.get("config")
    missing = [name for name in _NEEDED if not isinstance(config, dict) or name not in config]
    if missing:
        raise ValueError(f"load_model: {path} must describe its network in its header, got no {', '.join(missing)}")
    stored_method("load_model", path, about.get("method", ""), to_train=False)
    try:
        Config(**{name: config[name] for name in _NEEDED})
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_model: {path} must describe its network as train does, got {error}") from error
    return config


def run_path(op: str, run: str | os.PathLike) -> Path:
    """``run`` as a path, "~" being the user's home.

    Raises:
        TypeError: it is no path; the message begins with ``op``.
    """
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"{op}: run must be a path, got {run!r}")
    return Path(run).expanduser()


def reading_of(config: Mapping[str, Any], device: torch.device, **changes: Any) -> Reading:
    """How images are read for a network with the settings ``config`` on ``device``.

    ``changes`` are ``Reading``'s, None = its own.
    """
    from fastreid_u.data import test_transform

    height, width = config["height"], config["width"]
    view = test_transform(height, width, pixel_norm=config["pixel_norm"])
    batch_size = feature_batch(config["eval_batch_size"], device, height, width)
    own = {"batch_size": batch_size, "truncated": config.get("truncated_images", False)}
    return Reading(view, **own | {name: value for name, value in changes.items() if value is not None})

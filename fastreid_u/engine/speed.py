# SPDX-License-Identifier: Apache-2.0
"""What is left to the machine: memory layout, images per batch of an extraction, precision of the steps.

Rules decide, not a stopwatch, so that the same run comes out the same every time. docs/runs.md has the figures that
they rest on.
"""

import dataclasses
import platform

import torch
from torch import nn

from fastreid_u.config import Config
from fastreid_u.engine.device import Machine, uses_bfloat16
from fastreid_u.engine.display import Display

_PIXELS = 32 * 128 * 64  # in a batch of an extraction on a CPU: few enough for its caches, enough for all its cores
_GPU_BATCH = 256


def fitted_to_machine(config: Config, device: torch.device) -> Config:
    """``config`` with the layout decided where it was left open.

    A run stores it: a resumed one, and features of its networks later, have the same layout.
    """
    if config.channels_last is not None:
        return config
    return dataclasses.replace(config, channels_last=_prefers_channels_last(device))


def _prefers_channels_last(device: torch.device) -> bool:
    """On x86-64 with oneDNN, where most networks that were tried are faster, and none by more than a tenth slower."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def feature_batch(size: int | None, device: torch.device, height: int, width: int) -> int:
    """Images per batch of an extraction: ``Config.eval_batch_size``, or what suits ``device`` where that is None."""
    if size is not None:
        return size
    return min(_GPU_BATCH, max(8, _PIXELS // (height * width))) if device.type == "cpu" else _GPU_BATCH


def machine_for(config: Config, device: torch.device, model: nn.Module, display: Display) -> Machine:
    """Where ``model`` is trained by ``config``.

    ``amp="auto"`` trains in float32 a network with depthwise convolutions, whose steps are slower in bfloat16.
    """
    features = uses_bfloat16(config.amp, device)
    steps = features and (config.amp != "auto" or not _has_depthwise(model))
    return Machine(device, features, display, steps)


def _has_depthwise(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in model.modules())


def speed_line(config: Config, machine: Machine) -> str:
    """How fast networks are run, for the recipe card: "channels_last, float32; features: 32 images a batch, ..."."""
    layout = "channels_last" if config.channels_last else "contiguous layout"
    precision = "bfloat16" if machine.autocast else "float32"
    if machine.autocast_steps != machine.autocast:
        precision += " features, float32 steps"
    batch = feature_batch(config.eval_batch_size, machine.device, config.height, config.width)
    folded = ", BatchNorm folded" if machine.device.type == "cpu" else ""
    return f"{layout}, {precision}; features: {batch} images a batch{folded}"

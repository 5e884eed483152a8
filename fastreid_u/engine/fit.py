# SPDX-License-Identifier: Apache-2.0
"""One epoch of steps: forward, loss, backward, memory, weights."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastreid_u.config import Config
from fastreid_u.engine.display import Display
from fastreid_u.engine.extract import BadImageLog
from fastreid_u.ops._device_flag import raise_flagged
from fastreid_u.recipe import Recipe

if TYPE_CHECKING:
    from fastreid_u.data import ReIDLoader


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam with L2 penalty on every trainable parameter, BatchNorm and GeM's exponent included, as published."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate(config: Config, epoch: int) -> float:
    drops = epoch // config.step_size if config.step_size else 0
    return config.lr * config.gamma**drops


def fit_epoch(
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: "ReIDLoader",
    labels: Tensor,
    epoch: int,
    *,
    display: Display,
    log: BadImageLog,
    device: torch.device,
    autocast: bool = False,
) -> float:
    """Train for one epoch on ``labels`` (N,); returns the mean loss.

    The loss is looked at before it can reach the memory or the weights: at every step on a CPU; on a GPU, where
    looking costs a synchronisation, every ``print_freq`` steps and before the epoch counts as finished.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    config = recipe.config
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    model.train()
    labels = labels.to(device)
    total = torch.zeros((), device=device)
    steps = 0
    with display.phase(f"epoch {epoch}", config.iters or _pass_length(labels, config), unit="steps") as advance:
        for batch in loader.epoch(recipe.order(labels.cpu(), epoch), seed=(config.seed, epoch)):
            log.note(batch.bad)
            if not len(batch.indices):
                continue
            images = batch.images.to(device, non_blocking=True)
            indices = batch.indices.to(device)
            targets = labels[indices]

            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                x = model(images)
            x = x.float()
            loss = recipe.loss(x, targets, indices)
            total += loss.detach()
            steps += 1
            if device.type == "cpu" or steps % config.print_freq == 0:
                _require_finite(total, epoch, steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            recipe.update(x.detach(), targets, indices)
            optimizer.step()

            advance(1, note=f"loss {total.item() / steps:.3f}" if steps % config.print_freq == 0 else "")
    _require_finite(total, epoch, steps)
    return total.item() / max(steps, 1)


def _pass_length(labels: Tensor, config: Config) -> int:
    """Steps of one sampler pass, about: clusters with few images give fewer than ``num_instances``."""
    clusters = int(labels.max().item()) + 1
    return max(1, clusters * config.num_instances // config.batch_size)


def _require_finite(total: Tensor, epoch: int, step: int) -> None:
    if math.isfinite(total.item()):
        return
    try:
        raise_flagged()
        why = ""
    except ValueError as error:  # what a GPU kernel noticed in its inputs
        why = f" ({error})"
    raise FloatingPointError(
        f"loss is {total.item()} at epoch {epoch}, step {step}{why}; finished epochs are saved. "
        "Lower lr, raise temp, or use float32 (amp=off), and go on with resume=True"
    )

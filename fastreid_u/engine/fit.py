# SPDX-License-Identifier: Apache-2.0
"""One epoch of steps: forward, loss, backward, memory, weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastreid_u.config import Config
from fastreid_u.engine.display import Display
from fastreid_u.engine.extract import BadImageLog
from fastreid_u.ops._device_flag import raise_flagged
from fastreid_u.ranks import gather_batch
from fastreid_u.recipe import Batch, Images, Recipe, balanced_batches

if TYPE_CHECKING:
    from fastreid_u.data import ReIDLoader


def make_optimizer(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Adam with L2 penalty on every trainable parameter, BatchNorm and GeM's exponent included, as published."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
    extra = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, **extra)


def learning_rate(config: Config, epoch: int) -> float:
    """Linear warm-up from ``warmup_factor`` of lr, times gamma for every ``step_size`` epochs passed."""
    drops = epoch // config.step_size if config.step_size else 0
    rise = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.lr * (config.warmup_factor * (1 - rise) + rise) * config.gamma**drops


def fit_epoch(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    loader: "ReIDLoader",
    source_loader: "ReIDLoader | None",
    targets: Tensor,
    epoch: int,
    *,
    display: Display,
    log: BadImageLog,
    device: torch.device,
    autocast: bool = False,
) -> float:
    """Train for one epoch towards ``targets`` (N,); returns the mean loss.

    The loss is looked at before it can reach the memory or the weights: at every step on a CPU; on a GPU, where
    looking costs a synchronisation, every ``print_freq`` steps and before the epoch counts as finished.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    config = recipe.config
    if config.reset_optimizer:
        optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    recipe.train()
    total = torch.zeros((), device=device)
    steps = 0
    batches = recipe.batches(targets.cpu(), epoch)
    with display.phase(f"epoch {epoch}", len(batches), unit="steps") as advance:
        for batch in _loaded(recipe, batches, loader, source_loader, targets, epoch, log, device):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                x = recipe(batch)
            x, batch = gather_batch(_each(x, Tensor.float), batch)
            loss = _total(recipe.loss(x, batch))
            total += loss.detach()
            steps += 1
            if device.type == "cpu" or steps % config.print_freq == 0:
                _require_finite(total, epoch, steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                recipe.update(_each(x, Tensor.detach), batch)

            advance(1, note=f"loss {total.item() / steps:.3f}" if steps % config.print_freq == 0 else "")
    _require_finite(total, epoch, steps)
    return total.item() / max(steps, 1)


def _loaded(
    recipe: Recipe,
    batches: Sequence[Sequence[int]],
    loader: "ReIDLoader",
    source_loader: "ReIDLoader | None",
    targets: Tensor,
    epoch: int,
    log: BadImageLog,
    device: torch.device,
) -> Iterator[Batch]:
    """The epoch's batches on ``device``, each with one of source images where there is a source."""
    seed, images = (recipe.config.seed, epoch), recipe.images
    source = repeat(None)
    if source_loader is not None:
        own = balanced_batches(images.source, images.source.pids, recipe.config, epoch, len(batches))
        source = source_loader.epoch(own, seed=(*seed, 1))
    for loaded, labelled in zip(loader.epoch(batches, seed=seed), source):  # noqa: B905 - repeat(None) has no end
        log.note(loaded.bad)
        if labelled is not None:
            log.note(labelled.bad)
        if len(loaded.indices) and (labelled is None or len(labelled.indices)):
            extra = None if labelled is None else _on_device(labelled, images.source, images.source.pids, epoch, device)
            yield replace(_on_device(loaded, images, targets, epoch, device), source=extra)


def _on_device(loaded: Any, images: Images, targets: Tensor, epoch: int, device: torch.device) -> Batch:
    views = loaded.images if isinstance(loaded.images, tuple) else (loaded.images,)
    return Batch(
        views=tuple(view.to(device, non_blocking=True) for view in views),
        indices=loaded.indices.to(device),
        targets=targets[loaded.indices.to(targets.device)].to(device),
        camids=None if images.camids is None else images.camids[loaded.indices].to(device),
        epoch=epoch,
    )


def _total(loss: Tensor | dict[str, Tensor]) -> Tensor:
    """The loss, or the sum of its named terms, from the first to the last."""
    return loss if isinstance(loss, Tensor) else reduce(torch.add, loss.values())


def _each(x: Any, change: Any) -> Any:
    """``change`` applied to a tensor, or to every tensor of a tuple (a named one stays named)."""
    if isinstance(x, Tensor):
        return change(x)
    changed = [_each(item, change) for item in x]
    return type(x)(*changed) if hasattr(x, "_fields") else tuple(changed)


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
        "Start another run with a lower lr, a higher temp, or in float32 (amp=off): this one would end here again"
    )

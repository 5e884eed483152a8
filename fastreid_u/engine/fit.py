# SPDX-License-Identifier: Apache-2.0
"""One epoch of steps: forward, loss, backward, memory, weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreid_u.engine.allocator import keeping_freed_memory
from fastreid_u.engine.optimizer import learning_rate
from fastreid_u.ops.device_flag import raise_flagged
from fastreid_u.ranks import gather_batch
from fastreid_u.recipe import Batch, Images, balanced_batches

if TYPE_CHECKING:
    from fastreid_u.data import Loaded
    from fastreid_u.engine.session import Session


def fit_epoch(session: "Session", epoch: int, targets: Tensor) -> float:
    """Train for one epoch towards ``targets`` (N,); returns the mean loss.

    The loss is looked at before it can reach the memory or the weights: at every step on a CPU; on a GPU, where
    looking costs a synchronisation, every ``print_freq`` steps and before the epoch counts as finished.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    recipe, optimizer, machine = session.recipe, session.optimizer, session.machine
    config = recipe.config
    if config.reset_optimizer:
        optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    recipe.train()
    total = torch.zeros((), device=machine.device)
    steps, note = 0, ""
    batches = recipe.batches(targets.cpu(), epoch)
    phase = machine.display.phase(f"epoch {epoch}", len(batches), unit="steps")
    with keeping_freed_memory(machine.device), phase as advance:
        for batch in _loaded(session, batches, targets, epoch):
            with machine.precision(steps=True):
                outputs = recipe(batch)
            outputs, batch = gather_batch(_each(outputs, Tensor.float), batch)
            loss = _total(recipe.loss(outputs, batch))
            total += loss.detach()
            steps += 1
            if machine.device.type == "cpu" or steps % config.print_freq == 0:
                _require_finite(total, epoch, steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                recipe.update(_each(outputs, Tensor.detach), batch)

            if steps % config.print_freq == 0:
                note = f"loss {total.item() / steps:.3f}"
            advance(1, note=note + session.pace.note(epoch, steps, len(batches)))
    _require_finite(total, epoch, steps)
    return total.item() / max(steps, 1)


def _loaded(session: "Session", batches: Sequence[Sequence[int]], targets: Tensor, epoch: int) -> Iterator[Batch]:
    """The epoch's batches on the device, each with one of source images where there is a source.

    A step is left out if fewer than two of its images, or of its source images, can be read: BatchNorm needs two.
    """
    recipe, images, device = session.recipe, session.recipe.images, session.machine.device
    seed = (recipe.config.seed, epoch)
    source = repeat(None)
    if session.source is not None:
        own = balanced_batches(images.source, images.source.pids, recipe.config, epoch, len(batches))
        source = session.source.train_batches(own, (*seed, 1))
    target = session.target.train_batches(batches, seed)
    for loaded, labelled in zip(target, source):  # noqa: B905 - repeat(None) has no end
        if len(loaded.indices) > 1 and (labelled is None or len(labelled.indices) > 1):
            batch = _on_device(loaded, images, targets, device)
            extra = None if labelled is None else _on_device(labelled, images.source, images.source.pids, device)
            yield replace(batch, source=extra, epoch=epoch)


def _on_device(loaded: "Loaded", images: Images, targets: Tensor, device: torch.device) -> Batch:
    """A loaded batch of ``images`` copied to ``device``, with the ``targets`` and cameras of its rows."""
    return Batch(
        views=tuple(view.to(device, non_blocking=True) for view in loaded.views),
        indices=loaded.indices.to(device),
        targets=targets[loaded.indices.to(targets.device)].to(device),
        camids=None if images.camids is None else images.camids[loaded.indices].to(device),
    )


def _total(loss: Tensor | dict[str, Tensor]) -> Tensor:
    """The loss, or the sum of its named terms, from the first to the last."""
    return loss if isinstance(loss, Tensor) else reduce(torch.add, loss.values())


def _each(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` applied to a tensor, or to every tensor of a tuple (a named one stays named)."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    changed = [_each(output, change) for output in outputs]
    return type(outputs)(*changed) if hasattr(outputs, "_fields") else tuple(changed)


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

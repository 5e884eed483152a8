# SPDX-License-Identifier: Apache-2.0
"""The loss of a memory that is updated when backward runs, as the published classes do in one call."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastreid_u._checks import require_floating
from fastreid_u.ranks import agreed_lengths, gather_in_rank_order, gather_lengths, world_size


def loss_then_update(memory: nn.Module, checked: Callable, x: Tensor, targets: Tensor, **settings) -> Tensor:
    """``memory.loss(x, targets, **settings)``; when backward reaches it, ``memory.update_`` follows.

    The loss is that of this rank's batch; the update takes in the batches of all ranks, in rank order. Ranks may have
    batches of different sizes. What is wrong with the batch of one is raised on all, here, before any waits for it.

    Nothing copies the memory: the gradient to ``x`` is made together with the loss, so several losses of one memory may
    go into one backward and all have seen the old rows. The update runs once for each call, at its first backward: a
    penalty on the gradient, or ``retain_graph=True``, does not repeat it. Without gradients there is no update. Only
    for a second derivative (``create_graph=True``) backward makes the gradient again, from a copy of the memory.

    Where gradients are enabled all ranks must call this together. If ``x`` requires grad on some ranks only, as where a
    rank has no images, all take the step: the loss requires grad on every rank, and every rank must run its backward.
    Where gradients are disabled (``torch.no_grad``) a rank may call this alone. A compiled call exchanges nothing
    before backward, and updates at every backward.

    Args:
        memory: with ``loss`` and ``update_``.
        checked: makes ``x`` and ``targets`` tensors, or raises.
        x, targets, settings: of ``memory.loss``.
    """
    wanted = isinstance(x, Tensor) and x.requires_grad
    shared = world_size() > 1 and not torch.compiler.is_compiling()
    if not (torch.is_grad_enabled() and (wanted or shared)):
        return memory.loss(*checked(x, targets), **settings)
    if torch.compiler.is_compiling():  # which splits forward and backward by itself
        x, targets = checked(x, targets)
        return memory.loss(_UpdateLast.apply(x, targets, memory, _alike(settings)), targets, **settings)
    leaf = x if wanted else torch.zeros(0, requires_grad=True)
    loss, step = _LossAndGradient.apply(leaf, x, targets, memory, checked, settings)
    return loss if step else loss.detach()


class _LossAndGradient(torch.autograd.Function):
    """The loss, and whether any rank wants a gradient; ``leaf`` is ``x`` where this rank does."""

    @staticmethod
    def forward(
        ctx, leaf: Tensor, x: object, targets: object, memory: nn.Module, checked: Callable, settings: dict
    ) -> tuple[Tensor, bool]:
        name, wanted, made = type(memory).__name__, leaf is x, []

        def of_this_rank() -> tuple[Tensor, Tensor, Tensor]:
            own, ids = checked(x, targets)
            require_floating(name, "x", own)
            own = own if wanted else own.clone()  # it may be of inference mode
            made.extend(_loss_and_gradient(memory, own.detach().requires_grad_(), ids, settings))
            return own, ids, ids.new_empty(int(wanted))

        (x, targets, _), (*ctx.lengths, wanting) = agreed_lengths(name, of_this_rank)
        loss, gradient = made
        ctx.memory, ctx.settings, ctx.targets = memory, settings, targets  # they may be of inference mode
        ctx.wanted, ctx.update_due = wanted, True
        ctx.save_for_backward(x, gradient)
        return loss.detach(), any(wanting)

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        (x, gradient), targets = ctx.saved_tensors, ctx.targets
        due, ctx.update_due = ctx.update_due, False  # the graph may be gone through again
        batch = gather_lengths((x.detach(), targets), ctx.lengths) if due else ()
        if torch.is_grad_enabled() and ctx.wanted:  # create_graph=True
            gradient = _with_graph(ctx.memory, x, targets, ctx.settings, gradient)
        if due:
            ctx.memory.update_(*batch, **_alike(ctx.settings))
        found = (gradient * upstream.reshape(-1, 1)).to(x.dtype) if ctx.wanted else None
        return found, None, None, None, None, None


def _alike(settings: dict) -> dict:
    """What of the loss's settings holds for the update as well."""
    return {name: settings[name] for name in ("normalize",) if name in settings}


def _loss_and_gradient(
    memory: nn.Module, x: Tensor, targets: Tensor, settings: dict, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient to ``x`` in float32: half precision would lose what a scaler has yet to raise."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        loss = memory.loss(x, targets, **settings)
        # the sum, as each sample moves its own loss only
        return loss, torch.autograd.grad(loss.sum(), x, create_graph=create_graph)[0]


def _with_graph(memory: nn.Module, x: Tensor, targets: Tensor, settings: dict, seen: Tensor) -> Tensor:
    """``seen``, the gradient made in forward, as a function of ``x``."""
    name = type(memory).__name__
    memory = copy.deepcopy(memory)  # the rows are about to move
    _, gradient = _loss_and_gradient(memory, x, targets, settings, create_graph=True)
    if not torch.allclose(gradient, seen, rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"{name}: rows must not move between a loss and its second derivative, got others; use loss(...), "
            "and update_(...) after the last backward"
        )
    return gradient


class _UpdateLast(torch.autograd.Function):
    """Identity on the features: backward comes here when the loss is done with the old rows."""

    @staticmethod
    def forward(ctx, x: Tensor, targets: Tensor, memory: nn.Module, alike: dict) -> Tensor:
        ctx.memory, ctx.alike = memory, alike
        ctx.save_for_backward(x, targets)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, targets = ctx.saved_tensors
        ctx.memory.update_(*gather_in_rank_order(x, targets), **ctx.alike)
        return upstream, None, None, None

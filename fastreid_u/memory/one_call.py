# SPDX-License-Identifier: Apache-2.0
"""The loss of a memory that is updated when backward runs, as the published classes do in one call."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastreid_u.ranks import agreed_lengths, gather_in_rank_order, gather_lengths


def loss_then_update(memory: nn.Module, checked: Callable, x: Tensor, targets: Tensor, **settings) -> Tensor:
    """``memory.loss(x, targets, **settings)``; when backward reaches it, ``memory.update_`` follows.

    The loss is that of this rank's batch; the update takes in the batches of all ranks, in rank order. Ranks may have
    batches of different sizes. What is wrong with the batch of one is raised on all, here, before any waits for it.

    Nothing copies the memory: the gradient to ``x`` is made together with the loss, so several losses of one memory may
    go into one backward and all have seen the old rows. Without gradients there is no update. Only for a second
    derivative (``create_graph=True``) backward makes the gradient again, from a copy of the memory.

    Args:
        memory: with ``loss`` and ``update_``.
        checked: makes ``x`` and ``targets`` tensors, or raises.
        x, targets, settings: of ``memory.loss``.
    """
    if not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad):
        return memory.loss(*checked(x, targets), **settings)
    if torch.compiler.is_compiling():  # which splits forward and backward by itself
        x, targets = checked(x, targets)
        return memory.loss(_UpdateLast.apply(x, targets, memory, _alike(settings)), targets, **settings)
    return _LossAndGradient.apply(x, targets, memory, checked, settings)


class _LossAndGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, targets: Tensor, memory: nn.Module, checked: Callable, settings: dict) -> Tensor:
        made: list[Tensor] = []

        def of_this_rank() -> tuple[Tensor, Tensor]:
            batch = checked(x, targets)
            made.extend(_loss_and_gradient(memory, x.detach().requires_grad_(), batch[1], settings))
            return batch

        (_, targets), ctx.lengths = agreed_lengths(type(memory).__name__, of_this_rank)
        loss, gradient = made
        ctx.memory, ctx.settings, ctx.targets = memory, settings, targets  # they may be of inference mode
        ctx.save_for_backward(x, gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (x, gradient), targets = ctx.saved_tensors, ctx.targets
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _with_graph(ctx.memory, x, targets, ctx.settings, gradient)
        ctx.memory.update_(*gather_lengths((x.detach(), targets), ctx.lengths), **_alike(ctx.settings))
        return (gradient * upstream.reshape(-1, 1)).to(x.dtype), None, None, None, None


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

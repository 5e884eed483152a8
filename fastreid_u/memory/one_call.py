# SPDX-License-Identifier: Apache-2.0
"""The loss of a memory that is updated when backward runs, as the published classes do in one call."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastreid_u.ranks import gather_in_rank_order


def loss_then_update(memory: nn.Module, x: Tensor, targets: Tensor, **settings) -> Tensor:
    """``memory.loss(x, targets, **settings)``; when backward reaches it, ``memory.update_`` follows.

    The loss is that of this rank's batch; the update takes in the batches of all ranks, in rank order.

    Nothing copies the memory: the gradient to ``x`` is made together with the loss, so several losses of one memory may
    go into one backward and all have seen the old rows. Without gradients there is no update.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return memory.loss(x, targets, **settings)
    if torch.compiler.is_compiling():  # which splits forward and backward by itself
        return memory.loss(_UpdateLast.apply(x, targets, memory), targets, **settings)
    return _LossAndGradient.apply(x, targets, memory, settings)


class _LossAndGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, targets: Tensor, memory: nn.Module, settings: dict) -> Tensor:
        with torch.enable_grad():  # in float32: half precision would lose what a gradient scaler has yet to raise
            leaf = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
            loss = memory.loss(leaf, targets, **settings)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)  # each sample moves its own loss only
        ctx.memory = memory
        ctx.save_for_backward(x, targets, gradient)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        x, targets, gradient = ctx.saved_tensors
        ctx.memory.update_(*gather_in_rank_order(x, targets))
        return (gradient * upstream.reshape(-1, 1)).to(x.dtype), None, None, None


class _UpdateLast(torch.autograd.Function):
    """Identity on the features: backward comes here when the loss is done with the old rows."""

    @staticmethod
    def forward(ctx, x: Tensor, targets: Tensor, memory: nn.Module) -> Tensor:
        ctx.memory = memory
        ctx.save_for_backward(x, targets)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, targets = ctx.saved_tensors
        ctx.memory.update_(*gather_in_rank_order(x, targets))
        return upstream, None, None

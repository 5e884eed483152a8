# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against cluster prototypes."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_1d,
    require_2d,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
    require_same_device,
    require_same_length,
    require_same_width,
    require_values_in,
)
from fastreid_u.ops._device_flag import flag
from fastreid_u.ops._dispatch import choose
from fastreid_u.reference import cluster_nce as reference

OP = "cluster_nce"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def cluster_nce(
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    weight: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of ``l2(x) @ memory.T / temperature`` against the cluster of each sample.

    Args:
        x: (B, D) floating point, any device. Raw network outputs: they are normalised here.
        targets: (B,) integers, a row of ``memory`` each, or ``ignore_index``.
        memory: (C, D) floating point prototypes, C >= 1, used as they are (unit rows, usually).
        temperature: divides the similarities; positive.
        normalize: scale the rows of ``x`` to unit length first; False if the caller did. A row of zeros stays zero.
        weight: (B,) factors on the loss of each sample; no gradient flows to it.
        ignore_index: target of samples that take no part.
        reduction: "mean" over the samples that take part (weights do not enter the divisor), "sum", or "none" for
            (B,) with zeros at ignored samples. With no sample left, mean and sum are 0 with zero gradients.
        backend: "auto", "triton" (three launches forward and backward) or "reference"; anything but "auto" runs there
            or raises.

    Returns:
        The loss, float32 (float64 for float64 inputs), on ``x``'s device. Differentiable with respect to ``x``, and to
        ``memory`` where that requires grad. Computed in float32 also under autocast. Memory: the reference a few
        times B x C; Triton 4 B C bytes up to 64 MiB, and beyond that about 16 MiB + 16 B D, making the logits again.

    Raises:
        TypeError, ValueError: wrong type, shape or value. Targets out of range are seen on a CPU, and on a GPU with
        ``FASTREID_U_CHECK=1``; without it the Triton kernel makes the loss of that sample NaN and reads nothing back,
        and ``fastreid_u.ops._device_flag.raise_flagged`` raises later.

    Dai et al., Cluster Contrast, ACCV 2022, equation 1.
    """
    op = OP
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x)))
    memory = require_floating(op, "memory", require_2d(op, "memory", as_tensor(op, "memory", memory)))
    targets = require_integer(op, "targets", require_1d(op, "targets", as_tensor(op, "targets", targets))).long()
    require_same_length(op, "targets", targets, "x", x)
    require_same_width(op, "memory", memory, "x", x)
    if len(memory) == 0:
        raise ValueError(f"{op}: memory must have at least one row, got shape {tuple(memory.shape)}")
    temperature = require_positive(op, "temperature", temperature)
    require_choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if weight is not None:
        weight = require_1d(op, "weight", as_tensor(op, "weight", weight)).detach()
        require_same_length(op, "weight", weight, "x", x)
        require_same_device(op, "weight", weight, "x", x)
    for name, other in (("targets", targets), ("memory", memory)):
        require_same_device(op, name, other, "x", x)
    require_values_in(op, "targets", targets, 0, len(memory), ignore=ignore_index)

    table = {"triton": _triton, "reference": reference.cluster_nce}
    if not HAS_TRITON:
        table["triton"] = "there is no triton for this platform"
    elif torch.float64 in (x.dtype, memory.dtype):
        table["triton"] = "the kernel computes in float32, and float64 was given"
    run = choose(op, x.device, backend, table)
    return run(
        x,
        targets,
        memory,
        temperature=temperature,
        normalize=normalize,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def _triton(
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    *,
    temperature: float,
    normalize: bool,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    from fastreid_u.kernels.cluster_nce import is_lean

    trained = torch.is_grad_enabled() and (x.requires_grad or memory.requires_grad)
    lean = not trained or is_lean(x.shape[0], memory.shape[0])  # nobody asks for the logits again
    loss, _, _ = _cluster_nce(x, targets, memory, weight, temperature, normalize, ignore_index, reduction, lean)
    return loss


@torch.library.custom_op("fastreid_u::cluster_nce", mutates_args=())
def _cluster_nce(
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    weight: Tensor | None,
    temperature: float,
    normalize: bool,
    ignore_index: int,
    reduction: str,
    lean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the backward statistics of each sample and, unless lean, the logits."""
    from fastreid_u.kernels.cluster_nce import cluster_nce_fwd

    return cluster_nce_fwd(
        x, targets, memory, temperature=temperature, normalize=normalize, weight=weight,
        ignore_index=ignore_index, reduction=reduction, lean=lean, status=flag(OP, x.device),
    )  # fmt: skip


@_cluster_nce.register_fake
def _(x, targets, memory, weight, temperature, normalize, ignore_index, reduction, lean):
    b, c = x.shape[0], memory.shape[0]  # len() would fix them
    loss = x.new_empty((b,) if reduction == "none" else (), dtype=torch.float32)
    return loss, x.new_empty((4, b), dtype=torch.float32), x.new_empty((b, 0 if lean else c), dtype=torch.float32)


@torch.library.custom_op("fastreid_u::cluster_nce_backward", mutates_args=())
def _cluster_nce_backward(
    grad: Tensor,
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    stats: Tensor,
    logits: Tensor,
    temperature: float,
    normalize: bool,
    ignore_index: int,
    need_x: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` and ``memory``, without rows where not needed."""
    from fastreid_u.kernels.cluster_nce import cluster_nce_bwd

    grad_x, grad_memory = cluster_nce_bwd(
        grad, x, targets, memory, stats, logits, temperature=temperature, normalize=normalize,
        ignore_index=ignore_index, need_x=need_x, need_memory=need_memory,
    )  # fmt: skip
    return x.new_empty(0, x.shape[1]) if grad_x is None else grad_x, (
        memory.new_empty(0, x.shape[1]) if grad_memory is None else grad_memory
    )


@_cluster_nce_backward.register_fake
def _(grad, x, targets, memory, stats, logits, temperature, normalize, ignore_index, need_x, need_memory):
    (b, d), c = x.shape, memory.shape[0]
    return x.new_empty(b if need_x else 0, d), memory.new_empty(c if need_memory else 0, d)


def _remember(ctx, inputs, output) -> None:
    x, targets, memory, _, ctx.temperature, ctx.normalize, ctx.ignore_index, _, _ = inputs
    _, stats, logits = output
    ctx.save_for_backward(x, targets, memory, stats, logits)
    ctx.set_materialize_grads(False)  # the logits get no gradient, not even zeros


def _backward(ctx, grad, *_):
    need_x, _, need_memory, *_ = ctx.needs_input_grad
    nothing = (None,) * 6
    if grad is None:
        return None, None, None, *nothing
    settings = ctx.temperature, ctx.normalize, ctx.ignore_index, need_x, need_memory
    grad_x, grad_memory = _cluster_nce_backward(grad, *ctx.saved_tensors, *settings)
    return grad_x if need_x else None, None, grad_memory if need_memory else None, *nothing


_cluster_nce.register_autograd(_backward, setup_context=_remember)

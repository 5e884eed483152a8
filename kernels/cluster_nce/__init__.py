# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against a memory of prototypes, forward and backward (Triton).

Stands alone: needs torch and triton, nothing else; copy this folder to use it elsewhere.
Methods: Cluster Contrast (Dai et al., ACCV 2022, equation 1), SpCL, CACL, DCCC, PPLR; oracle and formulas:
fastreid_u/reference/cluster_nce.py.  Cost: 4 B C D multiply-adds forward and backward, 6 with a teacher; memory read
twice.

With l = l2(x) @ memory.T / T, p = softmax(l), y the target and t the distribution it becomes, the loss of a sample is
F S with S = -sum_c t_c log p_c and the focal factor F = (1 - p_y)^g, and

    d loss / d l_c = (F sum t + G) p_c - F t_c - G [c = y]              G = g (1 - p_y)^(g - 1) p_y S
    d loss / d x   = ((d loss / d l) @ memory / T - x̂ slope) / |x|      slope = sum_c l_c d loss / d l_c,  x̂ = x / |x|

Every option is a coefficient of a sample on p, on [c = y], on the teacher's softmax, on 1, on the extra target. The
slope is the part of the gradient along x̂, which the normalisation removes. Loss, coefficients and slope come out of
sums over the classes that the forward makes on the fly, so the backward needs no pass over a finished gradient. Small
batches store their logits once and take three launches in all; past ``STORED_BYTES`` the backward makes them again, a
block of classes at a time ("lean").

``logits.py`` makes the logits and sums them over the classes, ``loss.py`` makes losses and coefficients out of those
sums, ``backward.py`` the gradients. Nothing is accumulated by atomics and no tile depends on the device: equal inputs
give equal bits.
"""

import torch

from .backward import cluster_nce_bwd
from .layout import STATS
from .loss import cluster_nce_fwd
from .settings import BAD_TARGET, MASKED_TARGET, PRECISIONS, Settings, is_lean

__all__ = [
    "BAD_TARGET",
    "MASKED_TARGET",
    "STATS",
    "Settings",
    "cluster_nce",
    "cluster_nce_bwd",
    "cluster_nce_fwd",
    "is_lean",
]


def cluster_nce(
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    *,
    lean: bool | None = None,
    status: torch.Tensor | None = None,
    **settings,
) -> torch.Tensor:
    """``-(1 - p_y)^focal sum_c t_c log p_c``, differentiable with respect to ``x`` and ``memory``.

    ``p = softmax(l2(x) @ memory.T / temperature)``; ``t`` is ``teacher_weight`` times the teacher's softmax, plus
    ``smoothing`` over the number of classes, plus ``extra_weight`` times ``extra_target``, and the rest of 1 on the
    target. With ``epsilon``, which needs a plain target, ``p_c = e_c / (sum e + epsilon)`` and ``log(p_y + epsilon)``.

    Args:
        x: (B, D) float32, float16 or bfloat16.
        targets: (B,) integers in 0 .. C - 1, or ``ignore_index``. Any other makes the loss NaN.
        memory: (C, D), the same choice of dtypes, C >= 1.
        lean: never store the logits; None does so where they would take more than ``STORED_BYTES``.
        status: (1,) int32, or-ed with ``BAD_TARGET`` if a target is out of range, ``MASKED_TARGET`` if it is masked.
        settings: fields of ``Settings``.

    Returns the float32 loss. Memory beyond inputs and gradients: 4 B C bytes up to 64 MiB, 8 B C with a teacher; lean,
    about 16 MiB + 16 B D.
    """
    settings = Settings(**settings)
    _check(x, targets, memory, settings)
    return _ClusterNCE.apply(x, targets, memory, settings, lean, status)


class _ClusterNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, targets, memory, settings, lean, status):
        loss, stats, logits = cluster_nce_fwd(x, targets, memory, settings, lean=lean, status=status)
        ctx.save_for_backward(x, targets, memory, stats, logits)
        ctx.settings = settings
        return loss

    @staticmethod
    def backward(ctx, grad):
        need_x, _, need_memory, *_ = ctx.needs_input_grad
        needs = {"need_x": need_x, "need_memory": need_memory}
        grad_x, grad_memory = cluster_nce_bwd(grad, *ctx.saved_tensors, ctx.settings, **needs)
        return grad_x, None, grad_memory, None, None, None


def _check(x: torch.Tensor, targets: torch.Tensor, memory: torch.Tensor, settings: Settings) -> None:
    if memory.ndim != 2 or x.ndim != 2 or memory.shape[1] != x.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"{tuple(x.shape)}, {tuple(targets.shape)}, {tuple(memory.shape)}"
        raise ValueError(f"cluster_nce: x, targets, memory must be (B, D), (B,), (C, D), got {shapes}")
    if len(memory) == 0:
        raise ValueError(f"cluster_nce: memory must have at least one row, got shape {tuple(memory.shape)}")
    for name, tensor in (("x", x), ("memory", memory)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"cluster_nce: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    s, b, c = settings, len(x), len(memory)
    shapes = {"teacher": tuple(x.shape), "extra_target": (b, c), "class_mask": (c,)}
    for name, given in s._asdict().items():
        shape = shapes.get(name, (b,))
        if isinstance(given, torch.Tensor) and given.shape != shape:
            raise ValueError(f"cluster_nce: {name} must have shape {shape}, got {tuple(given.shape)}")
    if 0 < s.focal < 1 or s.focal < 0:
        raise ValueError(f"cluster_nce: focal must be 0 or at least 1, got {s.focal!r}")
    if s.epsilon > 0 and any(s.soft.values()):
        raise ValueError(f"cluster_nce: epsilon must be 0 with a teacher, smoothing or extra_target, got {s.epsilon!r}")
    if s.reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cluster_nce: reduction must be one of 'mean', 'sum', 'none', got {s.reduction!r}")
    if s.precision not in PRECISIONS:
        choices = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"cluster_nce: precision must be one of {choices}, got {s.precision!r}")

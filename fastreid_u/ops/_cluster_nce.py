# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``cluster_nce`` as operators of torch: gradients, fake tensors, no break in a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_u.ops._dispatch import first_derivative_only
from fastreid_u.ops.device_flag import flag


def takes_part(share: float | Tensor | None) -> bool:
    """Whether a part of the target with this share counts."""
    return isinstance(share, Tensor) or (share is not None and share > 0)


def run_triton(x: Tensor, targets: Tensor, memory: Tensor, **given) -> Tensor:
    """The loss of checked arguments, each under its name in ``cluster_nce``."""
    from fastreid_u.kernels.cluster_nce import is_lean

    teacher = given["teacher"] if takes_part(given["teacher_weight"]) else None
    extra_target = given["extra_target"] if takes_part(given["extra_weight"]) else None
    shares = given["teacher_weight"], given["smoothing"], given["extra_weight"]
    each = [share if isinstance(share, Tensor) else None for share in shares]
    one = [0.0 if share is None or isinstance(share, Tensor) else float(share) for share in shares]
    trained = torch.is_grad_enabled() and (x.requires_grad or memory.requires_grad)
    loss, _, _ = cluster_nce_op(
        x, targets, memory, teacher, extra_target, given["class_mask"], given["weight"], *each, one,
        given["temperature"], given["teacher_temperature"] or given["temperature"], given["focal"], given["epsilon"],
        given["normalize"], given["ignore_index"], given["reduction"],
        # without a gradient the logits are not needed again
        not trained or is_lean(x.shape[0], memory.shape[0], teacher is not None),
    )  # fmt: skip
    return loss


@torch.library.custom_op("fastreid_u::cluster_nce", mutates_args=())
def cluster_nce_op(
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    teacher: Tensor | None,
    extra_target: Tensor | None,
    class_mask: Tensor | None,
    weight: Tensor | None,
    teacher_each: Tensor | None,
    smoothing_each: Tensor | None,
    extra_each: Tensor | None,
    shares: list[float],
    temperature: float,
    teacher_temperature: float,
    focal: float,
    epsilon: float,
    normalize: bool,
    ignore_index: int,
    reduction: str,
    lean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the backward statistics of each sample and, unless lean, the logits.

    ``shares`` are those of the teacher, the uniform and the extra target where samples have none of their own.
    """
    from fastreid_u.kernels.cluster_nce import Settings, cluster_nce_fwd

    each = teacher_each, smoothing_each, extra_each
    shares = [share if own is None else own for own, share in zip(each, shares, strict=True)]
    settings = Settings(
        temperature=temperature, normalize=normalize, teacher=teacher, teacher_weight=shares[0],
        teacher_temperature=teacher_temperature, smoothing=shares[1], extra_target=extra_target,
        extra_weight=shares[2], focal=focal, epsilon=epsilon, class_mask=class_mask, weight=weight,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    return cluster_nce_fwd(x, targets, memory, settings, lean=lean, status=flag("cluster_nce", x.device))


@cluster_nce_op.register_fake
def _(x, targets, memory, teacher, *settings):
    from fastreid_u.kernels.cluster_nce import STATS

    *_, reduction, lean = settings
    b, c = x.shape[0], memory.shape[0]  # len() would fix the sizes under torch.compile
    loss = x.new_empty((b,) if reduction == "none" else (), dtype=torch.float32)
    logits = x.new_empty((b if teacher is None else 2 * b, 0 if lean else c), dtype=torch.float32)
    return loss, x.new_empty((STATS, b), dtype=torch.float32), logits


@torch.library.custom_op("fastreid_u::cluster_nce_backward", mutates_args=())
def cluster_nce_backward_op(
    grad: Tensor,
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    teacher: Tensor | None,
    extra_target: Tensor | None,
    class_mask: Tensor | None,
    stats: Tensor,
    logits: Tensor,
    temperature: float,
    teacher_temperature: float,
    uniform: bool,
    normalize: bool,
    ignore_index: int,
    need_x: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` and ``memory``, without rows where not needed."""
    from fastreid_u.kernels.cluster_nce import Settings, cluster_nce_bwd

    settings = Settings(
        temperature=temperature, normalize=normalize, teacher=teacher, teacher_temperature=teacher_temperature,
        smoothing=float(uniform),  # how much of it is in the statistics
        extra_target=extra_target, class_mask=class_mask, ignore_index=ignore_index,
    )  # fmt: skip
    needs = {"need_x": need_x, "need_memory": need_memory}
    grad_x, grad_memory = cluster_nce_bwd(grad, x, targets, memory, stats, logits, settings, **needs)
    return x.new_empty(0, x.shape[1]) if grad_x is None else grad_x, (
        memory.new_empty(0, x.shape[1]) if grad_memory is None else grad_memory
    )


@cluster_nce_backward_op.register_fake
def _(grad, x, targets, memory, *options):
    *_, need_x, need_memory = options
    (b, d), c = x.shape, memory.shape[0]
    return x.new_empty(b if need_x else 0, d), memory.new_empty(c if need_memory else 0, d)


def _remember(ctx, inputs, output) -> None:
    x, targets, memory, teacher, extra_target, class_mask, _, _, smoothing_each, _, shares, *settings = inputs
    temperature, teacher_temperature, _, _, normalize, ignore_index, *_ = settings
    uniform = smoothing_each is not None or shares[1] > 0
    ctx.settings = temperature, teacher_temperature, uniform, normalize, ignore_index
    _, stats, logits = output
    ctx.save_for_backward(x, targets, memory, teacher, extra_target, class_mask, stats, logits)
    ctx.set_materialize_grads(False)  # the logits get no gradient, not even zeros


def _backward(ctx, grad, *_):
    need_x, _, need_memory, *_ = ctx.needs_input_grad
    grad_x, grad_memory = None, None
    if grad is not None:
        grad_x, grad_memory = cluster_nce_backward_op(grad, *ctx.saved_tensors, *ctx.settings, need_x, need_memory)
    return grad_x if need_x else None, None, grad_memory if need_memory else None, *(None,) * 16


cluster_nce_op.register_autograd(_backward, setup_context=_remember)
cluster_nce_backward_op.register_autograd(first_derivative_only("cluster_nce"))

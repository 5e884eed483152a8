# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against cluster prototypes."""

from __future__ import annotations

import importlib.util
import math
import numbers

import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_1d,
    require_2d,
    require_choice,
    require_floating,
    require_ids,
    require_in_range,
    require_int,
    require_marked,
    require_positive,
    require_reals_in,
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
    teacher: Tensor | None = None,
    teacher_weight: float | Tensor | None = None,
    teacher_temperature: float | None = None,
    smoothing: float | Tensor = 0.0,
    extra_target: Tensor | None = None,
    extra_weight: float | Tensor | None = None,
    focal: float = 0.0,
    epsilon: float = 0.0,
    class_mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Softmax contrastive loss of each sample against a memory of prototypes.

    With ``l = l2(x) @ memory.T / temperature``, ``p = softmax(l)`` over the classes that take part, and ``y`` the
    target of a sample, its loss is ::

        (1 - p_y) ** focal * -sum_c t_c log p_c
        t = a onehot(y) + teacher_weight q + smoothing / classes + extra_weight extra_target
        q = softmax(l2(teacher) @ memory.T / teacher_temperature),   a = 1 - teacher_weight - smoothing - extra_weight

    and the plain cross-entropy ``-log p_y`` by default. No gradient flows through ``t``; it does through the focal
    factor. With ``epsilon``, as in SpCL: ``p_c = e^l_c / (sum e^l + epsilon)`` and ``-log(p_y + epsilon)``, which
    bounds the loss by ``-log(epsilon)`` and damps the gradient of samples that are very wrong.

    Args:
        x: (B, D) floating point, any device. Raw network outputs: they are normalised here.
        targets: (B,) integers, a row of ``memory`` each, or ``ignore_index``.
        memory: (C, D) floating point, C >= 1, used as it is: unit prototypes, means of clusters that are shorter, or
            the rows of a classifier.
        temperature: divides the similarities; positive.
        normalize: scale the rows of ``x`` and ``teacher`` to unit length first; False if the caller did, or means raw
            inner products. A row of zeros stays zero.
        teacher: (B, D) features of the same samples by a teacher; no gradient flows to it.
        teacher_weight: share of the teacher's distribution in the target, in [0, 1], one number or (B,); DCCC's kappa.
        teacher_temperature: that of the teacher's softmax; None for ``temperature``.
        smoothing: share of the uniform distribution, in [0, 1], one number or (B,).
        extra_target: (B, C) rows to add to the target, such as the distributions of other classifiers; no gradient.
            They may have any sum. Entries of classes that are masked do not count.
        extra_weight: their factor, in [0, 1], one number or (B,).
        focal: exponent of the factor ``1 - p_y``; 0 for none, else at least 1.
        epsilon: in [0, 1), for one-hot targets only.
        class_mask: (C,) bool, False for classes that take no part (clusters without members): they get no probability
            and no gradient, and no target may name them.
        weight: (B,) factors on the loss of each sample; no gradient flows to it.
        ignore_index: target of samples that take no part; whatever else they hold, their gradient is zero.
        reduction: "mean" over the samples that take part (weights do not enter the divisor), "sum", or "none" for
            (B,) with zeros at ignored samples. With no sample left, mean and sum are 0 with zero gradients.
        backend: "auto", "triton" (three launches forward and backward) or "reference"; anything but "auto" runs there
            or raises.

    Returns:
        The loss, float32 (float64 for float64 inputs), on ``x``'s device. Differentiable with respect to ``x``, and to
        ``memory`` where that requires grad. Computed in float32 also under autocast. NaN in ``x`` makes the loss NaN.
        Memory: the reference a few times B x C; Triton 4 B C bytes up to 64 MiB (8 B C with a teacher), and beyond
        that about 16 MiB + 16 B D, making the logits again.

    Raises:
        TypeError, ValueError: wrong type, shape or value, or options that exclude each other. Targets out of range or
        masked are seen on a CPU, and on a GPU with ``FASTREID_U_CHECK=1``; without it the Triton kernel makes the loss
        of that sample NaN and reads nothing back, and ``fastreid_u.ops._device_flag.raise_flagged`` raises later.

    Which method uses what: Cluster Contrast (Dai et al., ACCV 2022, equation 1) and BMW nothing; DCCC ``teacher``;
    SpCL ``class_mask, epsilon=1e-6``; CACL those and ``focal``, a memory of cluster means both; PPLR
    ``extra_target, extra_weight=0.5`` on the whole body, and ``smoothing`` of 0.1 or (B,) on the parts, with
    ``temperature=1, normalize=False`` and a memory that learns. PPLR counts its uniform part as a divergence, which is
    less by ``smoothing * log(C)``.
    """
    op = OP
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x)))
    memory = require_floating(op, "memory", require_2d(op, "memory", as_tensor(op, "memory", memory)))
    targets = require_ids(op, "targets", targets)
    require_same_length(op, "targets", targets, "x", x)
    require_same_width(op, "memory", memory, "x", x)
    if memory.shape[0] == 0:
        raise ValueError(f"{op}: memory must have at least one row, got shape {tuple(memory.shape)}")
    for name, other in (("targets", targets), ("memory", memory)):
        require_same_device(op, name, other, "x", x)
    settings = {
        "temperature": require_positive(op, "temperature", temperature),
        "normalize": bool(normalize),
        "focal": require_in_range(op, "focal", focal, 0, math.inf, open_high=True),
        "epsilon": require_in_range(op, "epsilon", epsilon, 0, 1, open_high=True),
        "ignore_index": require_int(op, "ignore_index", ignore_index),
        "reduction": require_choice(op, "reduction", reduction, ("mean", "sum", "none")),
    }
    if 0 < focal < 1:
        raise ValueError(f"{op}: focal must be 0 or at least 1, got {focal!r}")
    settings |= _soft_target(
        x, memory, teacher, teacher_weight, teacher_temperature, smoothing, extra_target, extra_weight
    )
    if settings["epsilon"] > 0 and (teacher is not None or extra_target is not None or _given(settings["smoothing"])):
        raise ValueError(f"{op}: epsilon must be 0 with a teacher, smoothing or extra_target, got {epsilon!r}")
    require_values_in(op, "targets", targets, 0, memory.shape[0], ignore=ignore_index)
    if class_mask is not None:
        class_mask = require_1d(op, "class_mask", as_tensor(op, "class_mask", class_mask))
        if class_mask.dtype != torch.bool:
            raise TypeError(f"{op}: class_mask must be bool, got {class_mask.dtype}")
        require_same_length(op, "class_mask", class_mask, "memory", memory)
        require_same_device(op, "class_mask", class_mask, "x", x)
        require_marked(op, "targets", targets, "class_mask", class_mask, ignore=ignore_index)
    if weight is not None:
        weight = _per_sample("weight", weight, x)
    settings |= {"class_mask": class_mask, "weight": weight}

    table = {"triton": _triton, "reference": reference.cluster_nce}
    if not HAS_TRITON:
        table["triton"] = "there is no triton for this platform"
    elif torch.float64 in (x.dtype, memory.dtype):
        table["triton"] = "the kernel computes in float32, and float64 was given"
    return choose(op, x.device, backend, table)(x, targets, memory, **settings)


def _soft_target(
    x: Tensor,
    memory: Tensor,
    teacher: object,
    teacher_weight: object,
    teacher_temperature: object,
    smoothing: object,
    extra_target: object,
    extra_weight: object,
) -> dict:
    """What the target holds besides the one class, checked, as keyword arguments."""
    op = OP
    for name, given, share in (
        ("teacher", teacher, teacher_weight),
        ("extra_target", extra_target, extra_weight),
    ):
        if (given is None) != (share is None):
            short = name.removesuffix("_target")
            absent, present = (name, f"{short}_weight") if given is None else (f"{short}_weight", name)
            raise ValueError(f"{op}: {absent} must be given with {present}, got None")
    if teacher is not None:
        teacher = require_floating(op, "teacher", require_2d(op, "teacher", as_tensor(op, "teacher", teacher))).detach()
        require_same_length(op, "teacher", teacher, "x", x)
        require_same_width(op, "teacher", teacher, "x", x)
        require_same_device(op, "teacher", teacher, "x", x)
        teacher_weight = _share("teacher_weight", teacher_weight, x)
    if teacher_temperature is not None:
        teacher_temperature = require_positive(op, "teacher_temperature", teacher_temperature)
        if teacher is None:
            raise ValueError(f"{op}: teacher must be given with teacher_temperature, got None")
    if extra_target is not None:
        extra_target = require_2d(op, "extra_target", as_tensor(op, "extra_target", extra_target)).detach()
        require_floating(op, "extra_target", extra_target)
        require_same_length(op, "extra_target", extra_target, "x", x)
        if extra_target.shape[1] != memory.shape[0]:
            rule = f"have a column for each row of memory ({memory.shape[0]})"
            raise ValueError(f"{op}: extra_target must {rule}, got {extra_target.shape[1]}")
        require_same_device(op, "extra_target", extra_target, "x", x)
        extra_weight = _share("extra_weight", extra_weight, x)
    smoothing = _share("smoothing", smoothing, x)
    shares = [share for share in (teacher_weight, smoothing, extra_weight) if share is not None]
    rule = "the sum of teacher_weight, smoothing and extra_weight"
    if not any(isinstance(share, Tensor) for share in shares):
        require_in_range(op, rule, sum(shares), 0, 1 + 1e-6)
    elif x.device.type == "cpu":  # a GPU would add them up for nobody
        require_reals_in(op, rule, sum(shares), 0, 1 + 1e-6)
    return {
        "teacher": teacher,
        "teacher_weight": teacher_weight,
        "teacher_temperature": teacher_temperature,
        "smoothing": smoothing,
        "extra_target": extra_target,
        "extra_weight": extra_weight,
    }


def _per_sample(name: str, given: object, x: Tensor) -> Tensor:
    """A number for each sample, without gradient."""
    given = require_floating(OP, name, require_1d(OP, name, as_tensor(OP, name, given))).detach()
    require_same_length(OP, name, given, "x", x)
    return require_same_device(OP, name, given, "x", x)


def _share(name: str, share: object, x: Tensor) -> float | Tensor:
    """A part of the target in [0, 1]: one for all samples, or one each."""
    if isinstance(share, numbers.Real):
        return require_in_range(OP, name, share, 0, 1)
    return require_reals_in(OP, name, _per_sample(name, share, x), 0, 1)


def _given(share: float | Tensor | None) -> bool:
    """Whether it leaves anything of its part of the target."""
    return isinstance(share, Tensor) or (share is not None and share > 0)


def _triton(x: Tensor, targets: Tensor, memory: Tensor, **given) -> Tensor:
    from fastreid_u.kernels.cluster_nce import is_lean

    teacher = given["teacher"] if _given(given["teacher_weight"]) else None
    extra_target = given["extra_target"] if _given(given["extra_weight"]) else None
    shares = given["teacher_weight"], given["smoothing"], given["extra_weight"]
    each = [share if isinstance(share, Tensor) else None for share in shares]
    one = [0.0 if share is None or isinstance(share, Tensor) else float(share) for share in shares]
    trained = torch.is_grad_enabled() and (x.requires_grad or memory.requires_grad)
    loss, _, _ = _cluster_nce(
        x, targets, memory, teacher, extra_target, given["class_mask"], given["weight"], *each, one,
        given["temperature"], given["teacher_temperature"] or given["temperature"], given["focal"], given["epsilon"],
        given["normalize"], given["ignore_index"], given["reduction"],
        # without a gradient nobody asks for the logits again
        not trained or is_lean(x.shape[0], memory.shape[0], teacher is not None),
    )  # fmt: skip
    return loss


@torch.library.custom_op("fastreid_u::cluster_nce", mutates_args=())
def _cluster_nce(
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
    return cluster_nce_fwd(x, targets, memory, settings, lean=lean, status=flag(OP, x.device))


@_cluster_nce.register_fake
def _(x, targets, memory, teacher, extra_target, class_mask, weight, teacher_each, smoothing_each, extra_each,
      shares, temperature, teacher_temperature, focal, epsilon, normalize, ignore_index, reduction, lean):  # fmt: skip
    from fastreid_u.kernels.cluster_nce import STATS

    b, c = x.shape[0], memory.shape[0]  # len() would fix the sizes under torch.compile
    loss = x.new_empty((b,) if reduction == "none" else (), dtype=torch.float32)
    logits = x.new_empty((b if teacher is None else 2 * b, 0 if lean else c), dtype=torch.float32)
    return loss, x.new_empty((STATS, b), dtype=torch.float32), logits


@torch.library.custom_op("fastreid_u::cluster_nce_backward", mutates_args=())
def _cluster_nce_backward(
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


@_cluster_nce_backward.register_fake
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
        grad_x, grad_memory = _cluster_nce_backward(grad, *ctx.saved_tensors, *ctx.settings, need_x, need_memory)
    return grad_x if need_x else None, None, grad_memory if need_memory else None, *(None,) * 16


_cluster_nce.register_autograd(_backward, setup_context=_remember)

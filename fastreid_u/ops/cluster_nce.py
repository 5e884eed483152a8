# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against cluster prototypes."""

from __future__ import annotations

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
from fastreid_u.ops._cluster_nce import run_triton, takes_part
from fastreid_u.ops._dispatch import choose, no_float64
from fastreid_u.reference import cluster_nce as reference

OP = "cluster_nce"


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
        of that sample NaN and reads nothing back, and ``fastreid_u.ops.device_flag.raise_flagged`` raises later.

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
    if settings["epsilon"] > 0 and (
        teacher is not None or extra_target is not None or takes_part(settings["smoothing"])
    ):
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

    cannot = {"triton": no_float64(x, memory)}
    run = choose(op, x.device, backend, cannot=cannot, triton=run_triton, reference=reference.cluster_nce)
    return run(x, targets, memory, **settings)


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
    elif x.device.type == "cpu":  # on a GPU the sum would be made, and not read
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

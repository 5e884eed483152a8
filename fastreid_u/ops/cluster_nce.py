# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against cluster prototypes."""

from __future__ import annotations

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
from fastreid_u.ops._dispatch import choose
from fastreid_u.reference import cluster_nce as reference


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
        backend: "auto" or "reference"; anything but "auto" runs there or raises.

    Returns:
        The loss, float32 (float64 for float64 inputs), on ``x``'s device. Differentiable with respect to ``x``, and to
        ``memory`` where that requires grad. Computed in float32 also under autocast. Memory: a few times B x C.

    Raises:
        TypeError, ValueError: wrong type, shape or value. Targets out of range are seen on a CPU, and on a GPU with
        ``FASTREID_U_CHECK=1``.

    Dai et al., Cluster Contrast, ACCV 2022, equation 1.
    """
    op = "cluster_nce"
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

    run = choose(op, x.device, backend, {"reference": reference.cluster_nce})
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

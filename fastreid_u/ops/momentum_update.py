# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place."""

from __future__ import annotations

from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_1d,
    require_2d,
    require_choice,
    require_finite,
    require_floating,
    require_in_range,
    require_integer,
    require_same_device,
    require_same_length,
    require_same_width,
    require_values_in,
)
from fastreid_u.ops._dispatch import choose
from fastreid_u.reference import momentum_update as reference


def momentum_update_(
    memory: Tensor,
    x: Tensor,
    targets: Tensor,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``row = l2(momentum * row + (1 - momentum) * l2(x_b))`` in place; call it after backward.

    Args:
        memory: (C, D) floating point torch tensor that does not require grad; changed in place.
        x: (B, D) floating point on the same device; normalised here, detached.
        targets: (B,) integers, the row of ``memory`` that each sample moves; -1 moves none.
        momentum: weight of the OLD row, in [0, 1]. The published recipes use 0.1, so a row is mostly its last sample.
        rule: "sequential" moves a row by each of its samples in batch order, normalising after every one; "hard" moves
            it once, by the sample least similar to the row as it was before the batch (the first such on ties).
        found_inf: one number on the same device, as a gradient scaler keeps it; nothing is moved unless it is 0.
        backend: "auto" or "reference"; anything but "auto" runs there or raises.

    Returns:
        ``memory``. Rows that no target names keep their bits; a row whose new length is 0 becomes zeros.

    Raises:
        TypeError, ValueError: wrong type, shape or value, a memory that requires grad. Targets out of range and NaN
        or infinity in ``x`` (without ``found_inf``) are seen on a CPU, and on a GPU with ``FASTREID_U_CHECK=1``; the
        memory is then untouched.

    Dai et al., Cluster Contrast, ACCV 2022, equations 2 and 3.
    """
    op = "momentum_update_"
    if not isinstance(memory, Tensor):
        raise TypeError(f"{op}: memory must be a torch tensor, as it is changed in place, got {type(memory).__name__}")
    if memory.requires_grad:
        raise ValueError(f"{op}: memory must not require grad, as it is changed in place, got requires_grad=True")
    require_floating(op, "memory", require_2d(op, "memory", memory))
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x))).detach()
    targets = require_integer(op, "targets", require_1d(op, "targets", as_tensor(op, "targets", targets))).long()
    require_same_length(op, "targets", targets, "x", x)
    require_same_width(op, "x", x, "memory", memory)
    for name, other in (("x", x), ("targets", targets)):
        require_same_device(op, name, other, "memory", memory)
    momentum = require_in_range(op, "momentum", momentum, 0, 1)
    require_choice(op, "rule", rule, ("sequential", "hard"))
    require_values_in(op, "targets", targets, 0, len(memory), ignore=-1)
    if found_inf is None:  # with it, an overflowing batch is expected and skipped
        require_finite(op, "x", x)

    run = choose(op, memory.device, backend, {"reference": reference.momentum_update_})
    return run(memory, x, targets, momentum=momentum, rule=rule, found_inf=found_inf)

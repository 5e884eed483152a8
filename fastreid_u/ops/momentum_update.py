# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place."""

from __future__ import annotations

import importlib.util
import math

import torch
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
from fastreid_u.ops._device_flag import flag
from fastreid_u.ops._dispatch import choose
from fastreid_u.reference import momentum_update as reference

OP = "momentum_update_"
HAS_TRITON, HAS_NUMBA = (importlib.util.find_spec(name) is not None for name in ("triton", "numba"))


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
        backend: "auto", "triton" (one launch), "numba" or "reference"; anything but "auto" runs there or raises.

    Returns:
        ``memory``. Rows that no target names keep their bits; a row whose new length is 0 becomes zeros. The bits of a
        moved row depend on that row and its own samples only, not on the rest of the batch.

    Raises:
        TypeError, ValueError: wrong type, shape or value, a memory that requires grad. Targets out of range and NaN
        or infinity in ``x`` (without ``found_inf``) are seen on a CPU, and on a GPU with ``FASTREID_U_CHECK=1``; the
        memory is then untouched. Without it the Triton kernel reads nothing back: a target out of range leaves the
        memory untouched, a sample that is not finite leaves its row untouched, and
        ``fastreid_u.ops._device_flag.raise_flagged`` raises later.

    Dai et al., Cluster Contrast, ACCV 2022, equations 2 and 3.
    """
    op = OP
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
    _momentum_update(memory, x, targets, momentum, rule, found_inf, backend)
    return memory


# Returns nothing: torch refuses an op that returns what it changed, so the wrapper above returns the memory.
@torch.library.custom_op("fastreid_u::momentum_update_", mutates_args=("memory",))
def _momentum_update(
    memory: Tensor,
    x: Tensor,
    targets: Tensor,
    momentum: float,
    rule: str,
    found_inf: Tensor | None,
    backend: str,
) -> None:
    require_values_in(OP, "targets", targets, 0, len(memory), ignore=-1)
    table = {"triton": _triton, "numba": _numba, "reference": reference.momentum_update_}
    if not HAS_TRITON:
        table["triton"] = "there is no triton for this platform"
    elif torch.float64 in (memory.dtype, x.dtype):
        table["triton"] = "the kernel computes in float32, and float64 was given"
    if not HAS_NUMBA:
        table["numba"] = "pip install numba"
    elif memory.dtype not in (torch.float32, torch.float64):
        table["numba"] = f"numba has no {memory.dtype}"
    run = choose(OP, memory.device, backend, table)
    if found_inf is None and run is not _numba:  # with it, an overflowing batch is expected and skipped
        require_finite(OP, "x", x)
    run(memory, x, targets, momentum=momentum, rule=rule, found_inf=found_inf)


@_momentum_update.register_fake
def _(memory, x, targets, momentum, rule, found_inf, backend) -> None:
    return None


def _triton(memory: Tensor, x: Tensor, targets: Tensor, **settings) -> None:
    from fastreid_u.kernels.momentum_update import momentum_update_ as launch

    launch(memory, x, targets, **settings, status=flag(OP, memory.device))


def _numba(memory: Tensor, x: Tensor, targets: Tensor, *, found_inf: Tensor | None, **settings) -> None:
    from fastreid_u.cpu import momentum_update as compiled

    if found_inf is not None and bool(found_inf.any()):
        return
    rows = memory.contiguous()
    samples = x.to(memory.dtype).contiguous().numpy()
    lengths = compiled.lengths(samples)
    if found_inf is None and not math.isfinite(lengths.sum()):  # ten times as fast as looking at every number
        require_finite(OP, "x", x)
    compiled.momentum_update_(rows.numpy(), samples, targets.contiguous().numpy(), **settings, sample_lengths=lengths)
    if rows is not memory:
        memory.copy_(rows)

# SPDX-License-Identifier: Apache-2.0
"""A teacher network that follows its student.

Plain torch: ``_foreach_lerp_`` moves all parameters in a handful of launches, at the speed of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastreid_u._checks import require_floating, require_in_range


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, alpha: float) -> nn.Module:
    """``teacher = alpha * teacher + (1 - alpha) * student`` in place, for parameters only.

    Buffers stay: the running statistics of a teacher's BatchNorm are its own, from its own forward passes.

    Args:
        teacher: changed; its parameters keep their dtype and need not be frozen.
        student: a network of the same parameters, by name and shape, on the same device; unchanged.
        alpha: weight of the OLD teacher, in [0, 1]; 0 copies the student, 1 changes nothing, whatever either holds.

    Returns:
        ``teacher``. Nothing is changed if anything is wrong.

    Raises:
        TypeError, ValueError: alpha out of range; parameters that differ in name, shape or device, or are not floating
        point; a parameter in both networks, under one name or two.

    Tarvainen and Valpola, Mean teachers, NeurIPS 2017; used in ICE, MMT and DCCC.
    """
    op = "ema_update_"
    alpha = require_in_range(op, "alpha", alpha, 0, 1)
    old, new = dict(teacher.named_parameters()), dict(student.named_parameters())
    if old.keys() != new.keys():
        name = min(old.keys() ^ new.keys())
        raise ValueError(f"{op}: student must have the parameters of teacher, got {name!r} in only one of them")
    borrowed = {id(weight) for weight in new.values()}
    for name, weight in old.items():
        mine, other = _describe(weight), _describe(new[name])
        if mine != other:
            raise ValueError(f"{op}: student must have {name} of {mine} like teacher, got {other}")
        if id(weight) in borrowed:
            raise ValueError(f"{op}: student must be another network than teacher, got {name} in both")
        require_floating(op, f"teacher's {name}", weight)
        require_floating(op, f"student's {name}", new[name])
    weights, goals = list(old.values()), [new[name].to(weight.dtype) for name, weight in old.items()]
    if alpha == 0 and weights:  # by copying: NaN and infinity outlive a weight of 0
        torch._foreach_copy_(weights, goals)
    elif alpha < 1 and weights:
        torch._foreach_lerp_(weights, goals, 1 - alpha)
    return teacher


def _describe(weight: Tensor) -> str:
    return f"shape {tuple(weight.shape)} on {weight.device}"

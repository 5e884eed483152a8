# SPDX-License-Identifier: Apache-2.0
"""Pulling features towards the other branch of a network, or towards its cluster.

Plain torch: B rows in, one number out, a few launches; nothing that a kernel would save could be measured beside the
backbone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_2d,
    require_floating,
    require_ids,
    require_same_device,
    require_same_length,
    require_same_width,
    require_values_in,
)


def cosine_align(x: Tensor, goals: Tensor, index: Tensor | None = None) -> Tensor:
    """``-mean_i <l2(x_i), l2(goal_i)>``, a loss in [-1, 1] without a temperature.

    Args:
        x: (B, D) floating point, any device: in CACL the predictor's output of the colour branch.
        goals: (B, D) on the same device, the goal of each sample; with ``index`` (C, D), as the cluster means of the
            grey branch. No gradient flows to them.
        index: (B,) integers, the row of ``goals`` that each sample goes to; -1 takes no part, whatever it holds.

    Returns:
        float32 (float64 for float64), differentiable with respect to ``x``; 0 with zero gradients if none takes part.
        A row of zeros, in ``x`` or the goals, has the cosine 0.

    Raises:
        TypeError, ValueError: wrong type or shape; an index out of range (seen on a CPU, on a GPU with
        ``FASTREID_U_CHECK=1``).

    Li et al., CACL, IEEE TIP 2022.
    """
    op = "cosine_align"
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x)))
    goals = require_floating(op, "goals", require_2d(op, "goals", as_tensor(op, "goals", goals))).detach()
    require_same_width(op, "goals", goals, "x", x)
    require_same_device(op, "goals", goals, "x", x)
    if index is None:
        require_same_length(op, "goals", goals, "x", x)
        kept = x.new_ones(len(x), dtype=torch.bool)
    else:
        index = require_ids(op, "index", index)
        require_same_length(op, "index", index, "x", x)
        require_same_device(op, "index", index, "x", x)
        require_values_in(op, "index", index, 0, len(goals), ignore=-1)
        kept = index != -1
        goals = goals[index.where(kept, 0)] if len(goals) else x.detach()
    dtype = torch.promote_types(torch.promote_types(x.dtype, goals.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        # Rows that take no part may hold anything: as zeros neither their cosine nor their gradient is NaN.
        x, goals = (F.normalize(rows.to(dtype).where(kept[:, None], 0), dim=1, eps=1e-12) for rows in (x, goals))
        cosine = (x * goals).sum(dim=1)
    return -cosine.sum() / kept.sum().clamp(min=1)

# SPDX-License-Identifier: Apache-2.0
"""Negative cosine between features and targets; Li et al., CACL, IEEE TIP 2022."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_align(x: Tensor, goals: Tensor, index: Tensor | None = None) -> Tensor:
    """``-mean_i <l2(x_i), l2(goals_i)>``, or against ``goals[index_i]``; no gradient flows to the goals."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, goals.dtype), torch.float32)
    goals = goals.detach() if index is None else goals.detach()[index]
    return -F.cosine_similarity(x.to(dtype), goals.to(dtype), dim=1, eps=1e-12).mean()

# SPDX-License-Identifier: Apache-2.0
"""Soft triplet loss over the hardest pairs of a batch.

Hermans et al., "In Defense of the Triplet Loss", 2017, with the soft margin and no other; PPLR, CVPR
2022, uses it so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_hard_triplet(x: Tensor, targets: Tensor, *, ignore_index: int = -1, reduction: str = "mean") -> Tensor:
    """``log(1 + exp(farthest of the same target - nearest of another))``, Euclidean; the anchor is one of its own."""
    x = x if x.dtype == torch.float64 else x.float()
    kept = targets != ignore_index
    distance = (x[:, None] - x[None, :]).square().sum(dim=2).clamp(min=1e-12).sqrt()
    same = targets[:, None] == targets[None, :]
    positive, negative = same & kept, ~same & kept
    if len(x) == 0:
        return x.sum(dim=1) if reduction == "none" else x.sum()
    farthest = distance.masked_fill(~positive, -torch.inf).amax(dim=1)
    nearest = distance.masked_fill(~negative, torch.inf).amin(dim=1)
    loss = F.softplus((farthest - nearest).where(kept & negative.any(dim=1), -torch.inf))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)

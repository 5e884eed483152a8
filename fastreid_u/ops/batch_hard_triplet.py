# SPDX-License-Identifier: Apache-2.0
"""Soft triplet loss over the hardest pairs of a batch.

Plain torch: the search is one matrix product and two reductions over B x B, and the gradient touches two rows per
anchor because the two distances are made again from the rows found.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_2d,
    require_choice,
    require_floating,
    require_ids,
    require_int,
    require_same_device,
    require_same_length,
)


def batch_hard_triplet(x: Tensor, targets: Tensor, *, ignore_index: int = -1, reduction: str = "mean") -> Tensor:
    """``log(1 + exp(d_p - d_n))``: ``d_p`` to the farthest sample of the anchor's target, ``d_n`` to the nearest other.

    Distances are Euclidean, on ``x`` as it is given (PPLR does not normalise), and at least 1e-6. The anchor is among
    the samples of its own target, so one that is alone has ``d_p`` = 1e-6. Where no other target is in the batch the
    loss is 0.

    Args:
        x: (B, D) floating point, any device.
        targets: (B,) integers on the same device, or ``ignore_index`` for samples that take no part, neither as anchor
            nor as another's positive or negative.
        reduction: "mean" over the samples that take part, "sum", or "none" for (B,) with zeros at the others.

    Returns:
        float32 (float64 for float64), differentiable, also under autocast. Memory: three times B x B, B x D for the
        backward. Nothing is read back from a GPU.

    Raises:
        TypeError, ValueError: wrong type or shape.

    Hermans et al., In Defense of the Triplet Loss, 2017; Cho et al., PPLR, CVPR 2022.
    """
    op = "batch_hard_triplet"
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x)))
    targets = require_ids(op, "targets", targets)
    require_same_length(op, "targets", targets, "x", x)
    require_same_device(op, "targets", targets, "x", x)
    ignore_index = require_int(op, "ignore_index", ignore_index)
    require_choice(op, "reduction", reduction, ("mean", "sum", "none"))
    x = x if x.dtype == torch.float64 else x.float()
    if len(x) == 0:
        return x.sum(dim=1) if reduction == "none" else x.sum()

    with torch.autocast(x.device.type, enabled=False):
        kept = targets != ignore_index
        x = x.where(kept[:, None], 0)  # the others may hold anything
        same = targets[:, None] == targets[None, :]
        positive, negative = same & kept, ~same & kept
        with torch.no_grad():
            # From the mean, or what the products share would drown the differences.
            y = x - x.mean(dim=0)
            squares = y.square().sum(dim=1)
            distance = squares[:, None] + squares[None, :] - 2 * y @ y.T
            farthest = distance.masked_fill(~positive, -torch.inf).argmax(dim=1)
            nearest = distance.masked_fill(~negative, torch.inf).argmin(dim=1)
        far, near = ((x - x[index]).square().sum(dim=1).clamp(min=1e-12).sqrt() for index in (farthest, nearest))
        loss = F.softplus(far - near).where(kept & negative.any(dim=1), 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)

# SPDX-License-Identifier: Apache-2.0
"""A sample against the teacher's view of its batch: ICE's loss over the hardest positive of each cluster.

Plain torch: B x B, once a step, and no bottleneck.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_u._checks import require_positive
from fastreid_u.ops._view_cosines import mean, view_cosines


def hard_instance_nce(x: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Every sample against the teacher's view of the batch, its positive the hardest of its cluster (ICE).

    With ``s_ij = <l2(x_i), l2(teacher_j)>``, ``p`` the smallest ``s_ij`` over the j of i's target, i among them::

        mean_i -log(exp(p / T) / (exp(p / T) + sum over the j of other targets of exp(s_ij / T)))

    Args:
        x: (B, D) features of the student, any length.
        teacher: (B, D) features of the teacher, of another view of the same images; no gradient flows to them.
        targets: (B,) integers, the cluster of each sample. Clusters may be in the batch any number of times.
        temperature: T, positive.

    Returns the loss, float32 or wider; 0 for a batch of one cluster. Chen et al., ICE, ICCV 2021.
    """
    temperature = require_positive("hard_instance_nce", "temperature", temperature)
    logits = view_cosines("hard_instance_nce", x, teacher) / temperature
    same = targets[:, None] == targets[None, :]
    hardest = logits.masked_fill(~same, torch.inf).amin(dim=1, keepdim=True) if len(x) else logits[:, :0]
    negatives = logits.masked_fill(same, -torch.inf)
    return mean(torch.cat([hardest, negatives], dim=1).logsumexp(dim=1) - hardest.sum(dim=1))

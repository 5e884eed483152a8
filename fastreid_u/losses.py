# SPDX-License-Identifier: Apache-2.0
"""Losses between two views of a batch: short functions of plain torch.

Losses against a memory are ops (``cluster_nce``, ``proxy_nce``), and so are those with an op's interest of their own
(``batch_hard_triplet``, ``cosine_align``). What is here is B x B, once a step, and nobody's bottleneck.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u._checks import require_positive


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
    logits = _cosines("hard_instance_nce", x, teacher) / temperature
    same = targets[:, None] == targets[None, :]
    hardest = logits.masked_fill(~same, torch.inf).amin(dim=1, keepdim=True) if len(x) else logits[:, :0]
    negatives = logits.masked_fill(same, -torch.inf)
    return _mean(torch.cat([hardest, negatives], dim=1).logsumexp(dim=1) - hardest.sum(dim=1))


def consistency_kl(x: Tensor, teacher: Tensor, anchor: Tensor, *, temperature: float = 0.4) -> Tensor:
    """The student relates a strong view to the batch as the teacher relates a weak one (ICE).

    ``mean_i KL(q_i || p_i)`` with ``p_i = softmax_j(<l2(x_i), l2(teacher_j)> / T)`` and, of the teacher's weak view,
    ``q_i = softmax_j(<l2(anchor_i), l2(anchor_j)> / T)``; j = i is among the j.

    Args:
        x: (B, D) features of the student, strong view, any length.
        teacher: (B, D) features of the teacher, another strong view; no gradient flows to them.
        anchor: (B, D) features of the teacher, weak view; no gradient flows to them.
        temperature: T, positive.

    Returns the loss, float32 or wider; ICE weighs it by 10. Chen et al., ICE, ICCV 2021.
    """
    temperature = require_positive("consistency_kl", "temperature", temperature)
    log_p = (_cosines("consistency_kl", x, teacher) / temperature).log_softmax(dim=1)
    log_q = (_cosines("consistency_kl", anchor.detach(), anchor) / temperature).log_softmax(dim=1)
    return _mean((log_q.exp() * (log_q - log_p)).sum(dim=1))


def _cosines(op: str, x: Tensor, teacher: Tensor) -> Tensor:
    """(B, B) in float32 or wider, also under autocast."""
    if x.ndim != 2 or x.shape != teacher.shape:
        shapes = f"{tuple(x.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{op}: both views must be (B, D) of one size, got {shapes}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, teacher.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.to(dtype), dim=1) @ F.normalize(teacher.detach().to(dtype), dim=1).T


def _mean(each: Tensor) -> Tensor:
    return each.sum() / max(len(each), 1)

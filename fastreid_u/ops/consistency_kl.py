# SPDX-License-Identifier: Apache-2.0
"""The relations between the samples of a batch, taught by a teacher: ICE's soft consistency.

Plain torch: B x B, once a step, and no bottleneck.
"""

from __future__ import annotations

from torch import Tensor

from fastreid_u._checks import require_positive
from fastreid_u.ops._view_cosines import mean, view_cosines


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
    log_p = (view_cosines("consistency_kl", x, teacher) / temperature).log_softmax(dim=1)
    log_q = (view_cosines("consistency_kl", anchor.detach(), anchor) / temperature).log_softmax(dim=1)
    return mean((log_q.exp() * (log_q - log_p)).sum(dim=1))

# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss over cluster prototypes, with every kind of target that the published methods use.

Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, equation 1; soft targets of a
teacher: DCCC, ICASSP 2024; uniform and dense ones: PPLR, CVPR 2022; focal factor: CACL, IEEE TIP 2022; masked classes
and epsilon: SpCL, NeurIPS 2020.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import inner_products


def cluster_nce(
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    teacher: Tensor | None = None,
    teacher_weight: float | Tensor | None = None,
    teacher_temperature: float | None = None,
    smoothing: float | Tensor = 0.0,
    extra_target: Tensor | None = None,
    extra_weight: float | Tensor | None = None,
    focal: float = 0.0,
    epsilon: float = 0.0,
    class_mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """``-(1 - p_y)^focal sum_c t_c log p_c`` with ``p = softmax(l2(x) @ memory.T / temperature)``, in float32 or wider.

    ``t = a onehot(y) + teacher_weight q + smoothing u + extra_weight extra_target``, with ``q`` the softmax of the
    teacher's logits on the same memory, ``u`` uniform over the classes that ``class_mask`` keeps, and ``a`` what the
    three weights leave of 1; no gradient flows through ``t``. With ``epsilon``, ``p_c = e_c / (sum e + epsilon)`` and
    the log is that of ``p_y + epsilon``. ``weight`` scales the loss of each sample; the mean divides by the number of
    samples that are not ignored, and is 0 if there is none.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, memory.dtype), torch.float32)
    kept = targets != ignore_index

    def clean(given: Tensor) -> Tensor:
        """Samples that take no part may hold anything: their rows become zeros."""
        return given.to(dtype).where(kept if given.ndim == 1 else kept[:, None], 0)

    with torch.autocast(x.device.type, enabled=False):  # logits reach +-20: half precision would round them visibly
        x, memory = clean(x), memory.to(dtype)
        if normalize:
            x = F.normalize(x, dim=1, eps=1e-12)
        logits = inner_products(x, memory) / temperature
        some_class = 0  # stands in for the target of a sample that takes no part
        if class_mask is not None:
            logits = logits.masked_fill(~class_mask, -torch.inf)
            some_class = class_mask.int().argmax()
        log_sum = torch.logsumexp(logits, dim=1)
        if epsilon > 0:
            log_sum = torch.logaddexp(log_sum, torch.full_like(log_sum, math.log(epsilon)))
        log_p_target = logits.gather(1, targets.where(kept, some_class)[:, None])[:, 0] - log_sum

        soft = []  # what the target holds besides the one class: weights (B,) and distributions (B, C)
        if teacher is not None:
            teacher = F.normalize(clean(teacher), dim=1, eps=1e-12) if normalize else clean(teacher)
            seen = teacher.detach() @ memory.detach().T / (teacher_temperature or temperature)
            seen = seen if class_mask is None else seen.masked_fill(~class_mask, -torch.inf)
            soft.append((teacher_weight, torch.softmax(seen, dim=1)))
        if isinstance(smoothing, Tensor) or smoothing > 0:
            classes = len(memory) if class_mask is None else class_mask.sum()
            soft.append((smoothing, torch.ones_like(logits) / classes))
        if extra_target is not None:
            soft.append((extra_weight, clean(extra_target.detach())))

        hard = 1 - sum(share for share, _ in soft)
        loss = -hard * (torch.log(log_p_target.exp() + epsilon) if epsilon > 0 else log_p_target)
        if soft:
            log_p = logits - log_sum[:, None]
            log_p = log_p if class_mask is None else log_p.masked_fill(~class_mask, 0)
            for share, target in soft:
                loss = loss - share * (target * log_p).sum(dim=1)
        if focal > 0:
            loss = (1 - log_p_target.exp()) ** focal * loss
        if weight is not None:
            loss = loss * clean(weight)
        loss = loss.where(kept, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)

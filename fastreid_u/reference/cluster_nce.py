# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss over cluster prototypes.

Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, equation 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cluster_nce(
    x: Tensor,
    targets: Tensor,
    memory: Tensor,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    weight: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``l2(x) @ memory.T / temperature`` against ``targets``, in float32 or wider.

    ``weight`` scales the loss of each sample; the mean divides by the number of samples that are not ignored, and is
    0 if there is none.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, memory.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # logits reach +-20: half precision would round them visibly
        x, memory = x.to(dtype), memory.to(dtype)
        if normalize:
            x = F.normalize(x, dim=1, eps=1e-12)
        logits = x @ memory.T / temperature
        kept = targets != ignore_index
        loss = torch.logsumexp(logits, dim=1) - logits.gather(1, targets.where(kept, 0)[:, None])[:, 0]
        loss = loss.where(kept, 0)
        if weight is not None:
            loss = loss * weight.to(dtype)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)

# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss over camera-aware proxies.

Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification" (CAP), AAAI 2021; the term
between cameras also in Chen et al., ICE, ICCV 2021, and Cho et al., PPLR, CVPR 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import inner_products


def proxy_nce(
    x: Tensor,
    clusters: Tensor,
    cameras: Tensor,
    memory: Tensor,
    proxy_clusters: Tensor,
    proxy_cameras: Tensor,
    *,
    temperature: float = 0.07,
    hard_negatives: int | None = 50,
    scope: str = "all",
    positives: str = "all",
    normalize: bool = True,
    ignore_index: int = -1,
    reduction: str = "mean",
    compat: bool = False,
) -> Tensor:
    """``-mean over P of log softmax(l2(x) @ memory.T / temperature)``, the softmax over P and H, float32 or wider.

    P: the proxies of a sample's cluster, with positives "other_cameras" but that of its own camera. H: of the proxies
    of other clusters the ``hard_negatives`` most similar. Scope "camera" leaves a sample the proxies of its own camera,
    and H is all of them. With ``compat`` the last of P, by index, fill up an H that is too short, so they count twice.
    A sample without any proxy of its cluster (in its camera) gets NaN; one that only its own camera has seen gets 0.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, memory.dtype), torch.float32)
    kept = clusters != ignore_index
    same = clusters[:, None] == proxy_clusters[None, :]
    own = cameras[:, None] == proxy_cameras[None, :]
    positive, negative = (same & own, ~same & own) if scope == "camera" else (same, ~same)
    known = positive.any(dim=1)
    if positives == "other_cameras":
        positive = positive & ~own
    count = positive.sum(dim=1)

    with torch.autocast(x.device.type, enabled=False):
        takes_part = kept & (count > 0)
        # A sample that takes no part may hold anything and must not make a NaN, in the gradient neither.
        x, memory = x.to(dtype).where(takes_part[:, None], 0), memory.detach().to(dtype)
        if normalize:
            x = F.normalize(x, dim=1, eps=1e-12)
        logits = inner_products(x, memory) / temperature
        pulled = positive | ~takes_part[:, None]
        terms = [logits.masked_fill(~pulled, -torch.inf), logits.masked_fill(~negative, -torch.inf)]
        if scope == "all" and hard_negatives is not None:
            terms[1] = terms[1].topk(min(hard_negatives, len(memory)), sorted=False).values
            if compat:
                missing = hard_negatives - negative.sum(dim=1, keepdim=True)
                rank_from_the_end = positive.flip(1).cumsum(dim=1).flip(1)
                twice = positive & (rank_from_the_end <= missing)
                terms.append(logits.masked_fill(~twice, -torch.inf))
        mean_positive = logits.masked_fill(~positive, 0).sum(dim=1) / count.clamp(min=1)
        loss = (torch.cat(terms, dim=1).logsumexp(dim=1) - mean_positive).where(takes_part, 0)
        loss = loss.where(known | ~kept, torch.nan)

    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / kept.sum().clamp(min=1)
    companions = ((cameras[:, None] == cameras[None, :]) & kept[None, :]).sum(dim=1)
    return (loss / companions.clamp(min=1)).sum()  # per camera the mean, of those the sum

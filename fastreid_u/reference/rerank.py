# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal re-ranking of a gallery, as published.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from .jaccard import shared_mass, to_distance
from .k_reciprocal import expand_query, k_reciprocal_sets, working_dtype


@torch.no_grad()
def rerank(
    query: Tensor | None,
    gallery: Tensor | None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    distance: str = "sqeuclidean",
    distmats: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """(Q, G) distances ``(1 - lambda_value) * jaccard + lambda_value * original``.

    "original" is the incoming distance squared again and divided by the largest of its column; lists hold k1 + 1
    entries, self included; weights are exp(-original) over the expanded reciprocal set. Ties rank by index.
    """
    if distmats is None:
        query, gallery = working_dtype(query), working_dtype(gallery)
        distmats = tuple(_pairwise(a, b, distance) for a, b in ((query, gallery), (query, query), (gallery, gallery)))
    q_g, q_q, g_g = distmats
    device, num_query = q_g.device, len(q_g)
    if q_g.numel() == 0:
        return q_g.clone()
    whole = torch.cat([torch.cat([q_q, q_g], dim=1), torch.cat([q_g.T, g_g], dim=1)]).cpu().numpy()
    n = len(whole)
    original = np.square(whole)
    largest = original.max(axis=0)
    # column i scaled by its maximum, then read as row i
    original = np.ascontiguousarray((original / np.where(largest > 0, largest, 1)).T)

    k1, k2 = min(k1, n - 1), min(k2, n)
    ranking = np.stack([row.argsort(kind="stable")[: max(k1 + 1, k2)] for row in original])
    sets = k_reciprocal_sets(ranking[:, : k1 + 1], ranking[:, : int(np.around(k1 / 2)) + 1])
    row = np.repeat(np.arange(n), np.diff(sets.indptr))
    weight = np.exp(-original[row, sets.indices])
    total = np.zeros(n, weight.dtype)
    np.add.at(total, row, weight)
    v = sparse.csr_array((weight / total[row], sets.indices, sets.indptr), shape=(n, n))
    if k2 != 1:
        v = expand_query(v, ranking[:, :k2])

    jaccard = np.stack([to_distance(mass[num_query:]) for mass in shared_mass(v, range(num_query))])
    mix = original.dtype.type(lambda_value)
    return torch.from_numpy((1 - mix) * jaccard + mix * original[:num_query, num_query:]).to(device)


def _pairwise(a: Tensor, b: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1 - F.normalize(a, dim=1, eps=1e-12) @ F.normalize(b, dim=1, eps=1e-12).T
    b64 = b.double()  # the expanded form cancels between near copies, which float64 can afford
    norm = b64.square().sum(dim=1)
    blocks = [a.new_zeros(0, len(b))]
    for rows in a.double().split(1024):
        sq_dist = (rows.square().sum(dim=1, keepdim=True) + norm - 2 * (rows @ b64.T)).clamp(min=0)
        blocks.append((sq_dist if distance == "sqeuclidean" else sq_dist.sqrt()).to(a.dtype))
    return torch.cat(blocks)

# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal re-ranking of a gallery by the three published rules, over matrices of all pairs.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .jaccard import jaccard_distance, shared_mass, to_distance
from .k_reciprocal import expand_query, reciprocal_sets, working_dtype


@torch.no_grad()
def rerank(
    query: Tensor | None,
    gallery: Tensor | None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    style: str = "openreid",
    distance: str = "sqeuclidean",
    distmats: tuple[Tensor, Tensor, Tensor] | None = None,
    top: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(Q, G) distances ``(1 - lambda_value) * jaccard + lambda_value * original``, or the ``top`` smallest of each row.

    "original" is the incoming distance, with "openreid" squared again, divided by the largest of its column; lists hold
    k1 + 1 entries, self included; weights are exp(-original) over the expanded reciprocal set. With "clustering" it is
    the distance as it is, and the Jaccard distance that of the clustering code. Ties rank the row itself first, then by
    index; query expansion takes them by index alone, so that copies average the same rows. Takes 20 (Q + G)^2 bytes.
    """
    if distmats is None:
        query, gallery = working_dtype(query), working_dtype(gallery)
    if style == "clustering":
        x = torch.cat([query, gallery])
        jaccard = jaccard_distance(_unit(x) if distance == "cosine" else x, k1, k2)[: len(query), len(query) :]
        return _nearest((1 - lambda_value) * jaccard + lambda_value * _pairwise(query, gallery, distance), top)
    if distmats is None:
        if distance != "cosine":
            query, gallery = _rescaled(query, gallery)
        distmats = tuple(_pairwise(a, b, distance) for a, b in ((query, gallery), (query, query), (gallery, gallery)))
    q_g, q_q, g_g = distmats
    if not q_g.numel():
        return _nearest(q_g, top)
    parts = [part.cpu().numpy() for part in (q_g, q_q, g_g)]
    final = _rerank(*parts, k1, k2, lambda_value, power=2 if style == "openreid" else 1)
    return _nearest(torch.as_tensor(final, device=q_g.device), top)


def _nearest(final: Tensor, top: int | None) -> Tensor | tuple[Tensor, Tensor]:
    """All distances, or the smallest of each row."""
    if top is None:
        return final
    nearest = final.sort(dim=1, stable=True)
    return nearest.values[:, :top], nearest.indices[:, :top]


def _rerank(
    q_g: np.ndarray, q_q: np.ndarray, g_g: np.ndarray, k1: int, k2: int, lambda_value: float, *, power: int
) -> np.ndarray:
    num_query = len(q_g)
    original = np.block([[q_q, q_g], [q_g.T, g_g]]) ** power
    largest = original.max(axis=0)
    # column i scaled by its maximum, then read as row i
    original = np.ascontiguousarray((original / np.where(largest > 0, largest, 1)).T)

    n = len(original)
    k1, k2 = min(k1, n - 1), min(k2, n)
    ranking = np.stack([_ranked(row, i)[: k1 + 1] for i, row in enumerate(original)])
    v = np.zeros_like(original)
    for i, members in enumerate(reciprocal_sets(ranking, k1 + 1, int(np.around(k1 / 2)) + 1)):
        weight = np.exp(-original[i, members])
        v[i, members] = weight / weight.sum()
    if k2 != 1:
        v = expand_query(v, np.stack([row.argsort(kind="stable")[:k2] for row in original]), k2)

    jaccard = np.stack([to_distance(mass[num_query:]) for mass in shared_mass(v, range(num_query))])
    mix = original.dtype.type(lambda_value)
    return (1 - mix) * jaccard + mix * original[:num_query, num_query:]


def _ranked(row: np.ndarray, own: int) -> np.ndarray:
    """Indices by value; of equal ones ``own`` first, then the lower."""
    index = np.append(own, np.delete(np.arange(len(row)), own))
    return index[row[index].argsort(kind="stable")]


def _pairwise(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """Differences summed in float64: copies are exactly 0 apart."""
    if distance == "cosine":  # half the squared distance of unit rows
        a, b = _unit(a), _unit(b)
    exact = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return {"euclidean": exact, "sqeuclidean": exact.square(), "cosine": exact.square() / 2}[distance].to(a.dtype)


def _rescaled(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Both divided by one power of two, exactly, where fourth powers of their entries would leave their dtype.

    Distances count in proportion to the largest of their column, so the result is that of any other scale.
    """
    largest = max((float(x.abs().amax()) for x in (query, gallery) if x.numel()), default=0.0)
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= 16:  # as all usual features
        return query, gallery
    return tuple((x.double() * 2.0**-exponent).to(x.dtype) for x in (query, gallery))


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length. Zeros have no direction: they get one of their own, at right angles to every other row."""
    lost = (x == 0).all(dim=1, keepdim=True)
    return torch.cat([F.normalize(x, dim=1), lost.to(x.dtype)], dim=1)

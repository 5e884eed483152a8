# SPDX-License-Identifier: Apache-2.0
"""mAP, CMC and mINP of a retrieval, one query after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .knn import pair_sq_dist

_BLOCK_ENTRIES = 2**23
_NEAR = 2.0**-22  # share of |q|^2 + |g|^2 below which their difference is measured rather than computed


class Scores(NamedTuple):
    """Means over the valid queries (NaN without one), the scores of each, and which queries they are."""

    mAP: float
    cmc: Tensor  # (max_rank,) float64
    mINP: float
    ap: Tensor  # (number of valid queries,) float64, as inp
    inp: Tensor
    valid: Tensor  # (Q,) bool


@torch.no_grad()
def rank_metrics(
    query: Tensor | None,
    gallery: Tensor | None,
    q_pids: Tensor,
    g_pids: Tensor,
    q_camids: Tensor | None = None,
    g_camids: Tensor | None = None,
    *,
    distmat: Tensor | None = None,
    q_images: Tensor | None = None,
    g_images: Tensor | None = None,
    ap: str = "rank",
    max_rank: int = 100,
) -> Scores:
    """Rank the gallery for each query by (distance, gallery index) and score the lists.

    Gallery images with the query's identity and camera, and those with its image number, are removed first. ``ap``:
    "rank", the mean over matches of precision at their rank; "sklearn", the same with precision taken at the end of
    each group of equal distances; "trapezoid", the area under straight lines between those points of the
    precision-recall curve.
    """
    device = (query if distmat is None else distmat).device
    q_pids, g_pids = q_pids.cpu().numpy(), g_pids.cpu().numpy()
    if q_camids is not None:
        q_camids, g_camids = q_camids.cpu().numpy(), g_camids.cpu().numpy()
    if q_images is not None:
        q_images, g_images = q_images.cpu().numpy(), g_images.cpu().numpy()

    precisions, penalties = [], []
    valid = np.zeros(len(q_pids), bool)
    first_match = np.zeros(max_rank, np.int64)
    for q, distance in enumerate(_distances(query, gallery, distmat)):
        order = distance.argsort(kind="stable")
        match = g_pids[order] == q_pids[q]
        if q_camids is not None:
            kept = ~(match & (g_camids[order] == q_camids[q]))
            order, match = order[kept], match[kept]
        if q_images is not None:
            kept = g_images[order] != q_images[q]
            order, match = order[kept], match[kept]
        rank = match.nonzero()[0] + 1  # of the matches, 1-based
        if len(rank) == 0:
            continue
        valid[q] = True
        precisions.append(_average_precision(match, distance[order], ap))
        penalties.append(len(rank) / rank[-1])
        if rank[0] <= max_rank:
            first_match[rank[0] - 1] += 1

    count = len(precisions)
    return Scores(
        mAP=float(np.mean(precisions)) if count else float("nan"),
        cmc=torch.from_numpy(first_match.cumsum() / (count if count else np.nan)).to(device),
        mINP=float(np.mean(penalties)) if count else float("nan"),
        ap=torch.tensor(precisions, dtype=torch.float64, device=device),
        inp=torch.tensor(penalties, dtype=torch.float64, device=device),
        valid=torch.from_numpy(valid).to(device),
    )


def _average_precision(match: np.ndarray, sorted_distance: np.ndarray, formula: str) -> float:
    hits = match.cumsum()
    if formula == "rank":
        cut = np.arange(len(match))
    else:  # a threshold lets in all equal distances at once
        cut = np.append(np.diff(sorted_distance) != 0, True).nonzero()[0]
    precision, gained = hits[cut] / (cut + 1), np.diff(hits[cut], prepend=0)
    if formula == "trapezoid":  # the curve starts at precision 1, recall 0
        precision = (precision + np.append(1.0, precision[:-1])) / 2
    return float(gained @ precision / hits[-1])


def _distances(query: Tensor | None, gallery: Tensor | None, distmat: Tensor | None) -> Iterator[np.ndarray]:
    """One vector of distances per query; from features the squared distance, in float64, scaled and rounded to float32.

    Copies in the gallery are measured once, so that they tie. Where a query is so near that the expanded form would
    leave rounding only, differences are summed instead: a copy of the query is at exactly 0.
    """
    if distmat is not None:
        yield from distmat.cpu().numpy()
        return
    if 0 in (len(query), *gallery.shape):
        yield from np.zeros((len(query), len(gallery)), np.float32)
        return
    distinct, copy_of = torch.unique(gallery, dim=0, return_inverse=True)
    centre = distinct.double().mean(dim=0)  # distances do not change with the origin; sums are smaller near the data
    g = distinct.double() - centre
    norm = g.square().sum(dim=1)
    for rows in query.split(max(1, _BLOCK_ENTRIES // len(gallery))):
        q = rows.double() - centre
        size = q.square().sum(dim=1, keepdim=True) + norm
        block = size - 2 * (q @ g.T)
        near = (block <= size * _NEAR).nonzero(as_tuple=True)
        block[near] = pair_sq_dist(rows, distinct, *near)
        power = math.frexp(float(size.max()))[1]  # a power of two changes no rank, and float32 then holds any scale
        yield from (block * 2.0**-power).float()[:, copy_of].cpu().numpy()

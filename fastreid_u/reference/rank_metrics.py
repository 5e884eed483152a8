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
    tpr: Tensor | None = None  # (F,) float64
    by_camera: tuple[Tensor, ...] | None = None  # cameras of queries (A,), of gallery (B,); mAP, top-1, queries (A, B)
    top_index: Tensor | None = None  # (Q, top) int64, -1 past the end
    top_distance: Tensor | None = None  # infinity past the end


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
    fprs: list[float] | None = None,
    by_camera: bool = False,
    top: int | None = None,
) -> Scores:
    """Rank the gallery for each query by (distance, gallery index) and score the lists.

    Gallery images with the query's identity and camera, and those with its image number, are removed first. ``ap``:
    "rank", the mean over matches of precision at their rank; "sklearn", the same with precision taken at the end of
    each group of equal distances; "trapezoid", the area under straight lines between those points of the
    precision-recall curve. ``fprs``: also the share of matches within the largest distance within which no more than
    floor(rate x others) of the other listed pairs of the queries with a match are; Q G numbers are kept for it.
    ``by_camera``: also the scores of the queries of a camera against the gallery images of a camera.
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
    accepted, rejected = [np.empty(0)], [np.empty(0)]
    width = min(top or 0, len(g_pids))
    index, near = np.full((len(q_pids), width), -1), np.full((len(q_pids), width), np.inf)
    exact = torch.float64 if distmat is not None and distmat.dtype == torch.float64 else torch.float32
    cells = _Cells(q_camids, g_camids) if by_camera else None
    for q, (distance, unit) in enumerate(_distances(query, gallery, distmat)):
        order = distance.argsort(kind="stable")
        match = g_pids[order] == q_pids[q]
        if q_camids is not None:
            kept = ~(match & (g_camids[order] == q_camids[q]))
            order, match = order[kept], match[kept]
        if q_images is not None:
            kept = g_images[order] != q_images[q]
            order, match = order[kept], match[kept]
        index[q, : len(order)], near[q, : len(order)] = order[:width], distance[order[:width]] * unit
        rank = match.nonzero()[0] + 1  # of the matches, 1-based
        if len(rank) == 0:
            continue
        valid[q] = True
        precisions.append(_average_precision(match, distance[order], ap))
        penalties.append(len(rank) / rank[-1])
        if rank[0] <= max_rank:
            first_match[rank[0] - 1] += 1
        if fprs is not None:
            accepted.append(distance[order[match]])
            rejected.append(distance[order[~match]])
        if cells is not None:
            cells.add(q, order, match, distance, ap)

    count = len(precisions)
    return Scores(
        mAP=float(np.mean(precisions)) if count else float("nan"),
        cmc=torch.from_numpy(first_match.cumsum() / (count if count else np.nan)).to(device),
        mINP=float(np.mean(penalties)) if count else float("nan"),
        ap=torch.tensor(precisions, dtype=torch.float64, device=device),
        inp=torch.tensor(penalties, dtype=torch.float64, device=device),
        valid=torch.from_numpy(valid).to(device),
        tpr=None
        if fprs is None
        else _true_accepts(np.concatenate(accepted), np.concatenate(rejected), fprs).to(device),
        by_camera=None if cells is None else tuple(torch.from_numpy(x).to(device) for x in cells.result()),
        top_index=None if top is None else torch.from_numpy(index).to(device),
        top_distance=None if top is None else torch.from_numpy(near).to(device, exact),
    )


class _Cells:
    """AP and first rank of each query in the gallery of each camera."""

    def __init__(self, q_camids: np.ndarray, g_camids: np.ndarray) -> None:
        self.q_camids, self.g_camids = q_camids, g_camids
        self.of_query, self.of_gallery = np.unique(q_camids), np.unique(g_camids)
        self.found = {(a, b): [] for a in self.of_query for b in self.of_gallery}

    def add(self, q: int, order: np.ndarray, match: np.ndarray, distance: np.ndarray, formula: str) -> None:
        for camera in self.of_gallery:
            here = self.g_camids[order] == camera
            if match[here].any():
                ap = _average_precision(match[here], distance[order[here]], formula)
                self.found[self.q_camids[q], camera].append((ap, match[here][0]))

    def result(self) -> tuple[np.ndarray, ...]:
        shape = len(self.of_query), len(self.of_gallery)
        means = [np.mean(x, axis=0) if x else (np.nan, np.nan) for x in self.found.values()]
        counts = np.array([len(x) for x in self.found.values()], np.int64).reshape(shape)
        ap, first = np.array(means, np.float64).reshape(*shape, 2).transpose(2, 0, 1)
        return self.of_query, self.of_gallery, ap.copy(), first.copy(), counts


def _true_accepts(matches: np.ndarray, others: np.ndarray, rates: list[float]) -> Tensor:
    """The share of matches nearer than the other pair that would be one too many."""
    if len(matches) == 0:
        return torch.full((len(rates),), torch.nan, dtype=torch.float64, device="cpu")
    others = np.append(np.sort(others), np.inf)
    limits = [others[math.floor(rate * (len(others) - 1))] for rate in rates]
    return torch.tensor([np.mean(matches < limit) for limit in limits], dtype=torch.float64, device="cpu")


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


def _distances(query: Tensor | None, gallery: Tensor | None, distmat: Tensor | None) -> Iterator[tuple]:
    """One vector of distances per query, and their unit; from features squared, in float64, scaled, in float32.

    Copies in the gallery are measured once, so that they tie. Where a query is so near that the expanded form would
    leave rounding only, differences are summed instead: a copy of the query is at exactly 0.
    """
    if distmat is not None:
        yield from ((row, 1.0) for row in distmat.cpu().numpy())
        return
    if 0 in (len(query), *gallery.shape):
        yield from ((np.zeros(len(gallery), np.float32), 1.0) for _ in query)
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
        yield from ((row, 2.0**power) for row in (block * 2.0**-power).float()[:, copy_of].cpu().numpy())

# SPDX-License-Identifier: Apache-2.0
"""Exact k nearest neighbours by squared Euclidean distance, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ENTRIES = 2**22  # of float64: 32 MB a temporary
_PAIR_ENTRIES = 2**17  # 1 MB, which caches hold


def pair_sq_dist(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``sum((x[rows] - y[columns]) ** 2)`` per pair, summed in float64: exactly 0 for copies, the same both ways."""
    sq_dist = x.new_empty(len(rows), dtype=torch.float64)
    step = max(1, _PAIR_ENTRIES // max(1, x.shape[1]))
    for out, i, j in zip(sq_dist.split(step), rows.split(step), columns.split(step), strict=True):
        torch.sum((x[i].double() - y[j].double()).square_(), dim=1, out=out)
    return sq_dist


@torch.no_grad()
def knn(x: Tensor, k: int, *, gallery: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of ``gallery`` (or of ``x`` itself) for every row of ``x``.

    Returns ``(sq_dist, index)``, both (N, min(k, rows searched)); ``sq_dist`` is float64 for float64 ``x``, else
    float32. Distances are summed in float64 and rounded once. Order: without a gallery the row itself, then by
    (rounded distance, index).

    A product of matrices gives a lower bound on every distance; whatever that cannot rule out of the first ``k`` is
    measured exactly and sorted, so ties at the cut-off are decided by index however many copies there are. Memory is
    a block of rows against all others, never N x N.
    """
    alone = gallery is None
    y = x if alone else gallery
    k = min(k, len(y))
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    if len(x) == 0 or k == 0:
        return x.new_zeros((len(x), k), dtype=dtype), x.new_zeros((len(x), k), dtype=torch.int64)

    if x.shape[1] == 0:  # nothing to tell rows apart, and nothing that unique() takes
        return knn(x.new_zeros(len(x), 1), k, gallery=None if alone else y.new_zeros(len(y), 1))
    distinct, copy_of = torch.unique(y, dim=0, return_inverse=True)  # copies are measured once
    # distances do not change with the origin; near the data the bound below is far tighter
    centre = y.double().mean(dim=0)
    y64 = y.double() - centre
    norm_y = y64.square().sum(dim=1)
    # |error| of the expanded form is at most slack * (|x|^2 + |y|^2): two dot products, and additions
    slack = (4 * x.shape[1] + 16) * torch.finfo(torch.float64).eps
    # two different distances may round to the same number, and then the index decides
    rounding = 1 + 4 * torch.finfo(dtype).eps

    distances, indices = [], []
    step = max(1, _BLOCK_ENTRIES // len(y))
    for start in range(0, len(x), step):
        x64 = x[start : start + step].double() - centre
        norm_x = x64.square().sum(dim=1, keepdim=True)
        lower = (1 - slack) * (norm_x + norm_y) - 2 * (x64 @ y64.T)
        nearest = lower.topk(k, largest=False)
        reach = (nearest.values + 2 * slack * (norm_x + norm_y[nearest.indices])).amax(dim=1, keepdim=True)
        row, column = (lower <= reach.clamp(min=0) * rounding).nonzero(as_tuple=True)

        pair, name = torch.unique(row * len(distinct) + copy_of[column], return_inverse=True)
        measured = pair_sq_dist(x[start : start + step], distinct, pair // len(distinct), pair % len(distinct))
        sq_dist = measured.to(dtype)[name]
        key = torch.where(column == row + start, -1.0, sq_dist) if alone else sq_dist
        order = key.argsort(stable=True)  # nonzero() lists columns in ascending order, which stable sorts keep
        order = order[row[order].argsort(stable=True)]
        count = row.bincount(minlength=len(x64))
        first = (count.cumsum(0) - count)[:, None] + torch.arange(k, device=x.device)
        distances.append(sq_dist[order[first]])
        indices.append(column[order[first]])
    return torch.cat(distances), torch.cat(indices)

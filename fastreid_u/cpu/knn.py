# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours on a CPU: a float32 product of matrices bounds every distance, float64 decides.

With a, b the lengths of two centred rows of width D and s their computed product, the squared distance lies within
(D + 16) u (a^2 + b^2) of a^2 + b^2 - 2 s, u being half an ulp of the product's type: gamma_D for the product in any
order of summation (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1) and the rest for rounding the
centred rows. Whatever that cannot rule out of the first k is measured. Centring leaves the order alone and
shrinks a and b, and with them the doubt, when the features share a large common part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ._threads import kernel, over_rows

_BLOCK_SCORES = 2**24  # of float32: 64 MB


@kernel(fastmath={"reassoc", "contract"})  # lets the sum run in SIMD lanes, in an order that is the same for every pair
def sq_dist(x, y, i, j):
    """Squared distance of ``x[i]`` and ``y[j]`` summed in float64: exactly 0 for copies, the same both ways."""
    total = 0.0
    for d in range(x.shape[1]):
        difference = np.float64(x[i, d]) - np.float64(y[j, d])
        total += difference * difference
    return total


@kernel
def ascend(keys):
    """Sort int64 keys in place. The one sort of this folder, because each that numba compiles takes seconds."""
    keys.sort()


@kernel
def _sift(heap, value):
    """Replace the root of a max-heap, which is its largest entry, by a smaller value."""
    n, at = len(heap), 0
    while True:
        child = 2 * at + 1
        if child >= n:
            break
        if child + 1 < n and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@kernel
def _select(begin, end, first, x, y, alone, scores, norm_x, norm_y, doubt, least, out_dist, out_index):
    """Rows ``begin .. end - 1`` of a block of scores that starts at row ``first`` of ``x``."""
    k, m = out_dist.shape[1], len(y)
    others = k - 1 if alone else k  # a row's own place is not contested
    upper = np.empty(others)
    best = np.empty(others, np.int64)
    far = np.int64(np.iinfo(np.int64).max)
    for r in range(begin, end):
        i = first + r
        own = i if alone else -1
        if alone:
            out_dist[i, 0], out_index[i, 0] = 0.0, i
        if others == 0:
            continue

        upper[:] = np.inf
        for j in range(m):
            size = norm_x[i] + norm_y[j]
            highest = size - 2.0 * scores[r, j] + (doubt * size + least)
            if highest < upper[0] and j != own:
                _sift(upper, highest)
        # two different distances may round to one float32, and then the index decides: 4 ulp on top
        reach = max(upper[0], 0.0) * (1.0 + 2.0**-21)

        # (distance, index) as one integer: the bits of a float32 >= 0 are in the order of the numbers
        best[:] = far
        cut = np.nan  # below nothing until k are known
        for j in range(m):
            size = norm_x[i] + norm_y[j]
            if size - 2.0 * scores[r, j] - (doubt * size + least) > reach or j == own:
                continue
            distance = np.float32(sq_dist(x, y, i, j))
            if distance >= cut:  # an equal one comes later in the order, as j ascends
                continue
            _sift(best, (np.int64(distance.view(np.int32)) << 32) | j)
            if best[0] != far:
                cut = np.int32(best[0] >> 32).view(np.float32)
                if cut == 0.0:  # k copies found; nothing later can come before them
                    break
        ascend(best)
        for p in range(others):
            out_dist[i, k - others + p] = np.int32(best[p] >> 32).view(np.float32)
            out_index[i, k - others + p] = best[p] & 0xFFFFFFFF


@kernel
def _rank(begin, end, x, y, alone, candidates, out_dist, out_index, found):
    """The nearest of each row's candidates, in the order of ``knn``; ``found[i]``: how many there were, k at most."""
    k, far = out_dist.shape[1], np.int64(np.iinfo(np.int64).max)
    keys = np.empty(candidates.shape[1], np.int64)
    for i in range(begin, end):
        count = 0
        for c in range(candidates.shape[1]):
            j = candidates[i, c]
            if j < 0 or (alone and j == i):
                continue
            keys[count] = (np.int64(np.float32(sq_dist(x, y, i, j)).view(np.int32)) << 32) | j
            count += 1
        ascend(keys[:count])
        at = 0
        if alone:
            out_dist[i, 0], out_index[i, 0] = 0.0, i
            at = 1
        before = far
        for c in range(count):
            if at < k and keys[c] != before:  # an index may name a row twice
                out_dist[i, at], out_index[i, at] = np.int32(keys[c] >> 32).view(np.float32), keys[c] & 0xFFFFFFFF
                at += 1
            before = keys[c]
        found[i] = at


def rank_candidates(
    x: np.ndarray, candidates: np.ndarray, k: int, *, gallery: np.ndarray | None = None, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``k`` nearest of given candidates, measured and ordered as :func:`knn` does.

    Args:
        x, k, gallery, threads: as in :func:`knn`.
        candidates: (N, m) int64 rows of the gallery; below 0 for none. A row itself need not be among its own.

    Returns:
        ``(sq_dist, index, found)``: the first two as :func:`knn`, of which row i holds ``found[i]``, (N,) int64.
    """
    out = np.zeros((len(x), k), np.float32), np.full((len(x), k), -1, np.int64)
    found = np.zeros(len(x), np.int64)
    y = x if gallery is None else gallery
    over_rows(_rank, len(x), threads, x, y, gallery is None, candidates, *out, found, most=1024)
    return *out, found


class Centred(NamedTuple):
    """Both sets of rows less the mean of the searched ones, scaled by a power of two.

    Attributes:
        x, y: rows; the same array if a set is searched for itself.
        norm_x, norm_y: their squared lengths in float64.
        scale: that power of two.
    """

    x: np.ndarray
    y: np.ndarray
    norm_x: np.ndarray
    norm_y: np.ndarray
    scale: float


def centre(x: np.ndarray, gallery: np.ndarray | None, dtype: type = np.float32) -> Centred:
    """Move and scale rows for a product of matrices: distances stay what they are, up to the scale."""
    y = x if gallery is None else gallery
    mean = sum(y[part].sum(axis=0, dtype=np.float64) for part in _parts(y)) / len(y)
    both = (x,) if gallery is None else (x, y)
    largest = max(np.abs(rows[part] - mean).max(initial=0) for rows in both for part in _parts(rows))
    # a power of two, which is exact: components of at most 1 neither overflow nor, if they matter, underflow
    scale = 2.0 ** -int(np.frexp(largest)[1])
    rows_y, norm_y = _centred(y, mean, scale, dtype)
    rows_x, norm_x = (rows_y, norm_y) if gallery is None else _centred(x, mean, scale, dtype)
    return Centred(rows_x, rows_y, norm_x, norm_y, scale)


def rounding(width: int, dtype: type = np.float32) -> tuple[float, float]:
    """How far a distance by a product in ``dtype`` may be off: relative to a^2 + b^2, and by underflow."""
    bound = (width + 16) * float(np.finfo(dtype).eps) / 2
    return bound / (1 - bound), (width + 16) * float(np.finfo(np.float32).tiny)


def _centred(x: np.ndarray, mean: np.ndarray, scale: float, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """``(x - mean) * scale`` in ``dtype``, and the squared lengths of these rows in float64."""
    rows, norm = np.empty(x.shape, dtype), np.empty(len(x))
    for part in _parts(x):
        rows[part] = (x[part] - mean) * scale
        norm[part] = np.square(rows[part], dtype=np.float64).sum(axis=1)
    return rows, norm


def _parts(x: np.ndarray) -> list[slice]:
    """Runs of rows small enough for a temporary in float64."""
    step = max(1, 2**20 // max(1, x.shape[1]))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def knn(
    x: np.ndarray,
    k: int,
    *,
    gallery: np.ndarray | None = None,
    threads: int = 1,
    product: Callable[[np.ndarray, np.ndarray, np.ndarray], object] = np.matmul,
    dtype: type = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest rows of ``gallery``, or of ``x`` itself, for every row of ``x``.

    Args:
        x: (N, D) float32, finite, contiguous.
        k: at most the number of rows searched.
        gallery: (M, D) as ``x``.
        threads: that select; ``product`` has its own.
        product: ``product(a, b, out)`` writes the matrix product of a (B, D) and b (D, M).
        dtype: in which ``product`` really computes, float32 or float64; the bound on its error depends on it.

    Returns:
        ``(sq_dist, index)``, (N, k) float32 and int64: the row itself if there is no gallery, then ascending by
        (distance, index). Distances are summed in float64 and rounded once.

    Memory beside the result: a centred copy of the rows, and a block of scores of 64 MB (or 64 rows, if that is more).
    """
    alone = gallery is None
    y = x if alone else gallery
    out = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int64)
    if len(x) == 0 or k == 0:
        return out

    rows = centre(x, gallery, dtype)
    bound, least = rounding(x.shape[1], dtype)
    step = max(64, _BLOCK_SCORES // len(y))
    scores = np.empty((min(step, len(x)), len(y)), dtype)
    for first in range(0, len(x), step):
        block = rows.x[first : first + step]
        found = scores[: len(block)]
        product(block, rows.y.T, found)
        given = (first, x, y, alone, found, rows.norm_x, rows.norm_y, bound, least, *out)
        over_rows(_select, len(block), threads, *given, most=256)
    return out

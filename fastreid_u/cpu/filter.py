# SPDX-License-Identifier: Apache-2.0
"""Rows of a block of scores to their nearest neighbours: a guess is measured, and then whatever bounds leave in doubt.

A score is a product of rows, maybe short ones (:mod:`.projection`), and bounds a distance from below. For each row

1. the hinted pairs, if any, and the k pairs of lowest bound are measured in float64: the k-th of these distances is a
   limit to the true k-th;
2. of all pairs whose bound is within that limit, a second, longer product bounds the distance again;
3. what is still within it is measured, and lowers the limit whenever it is among the first k.

A row's scores are read once for their least in runs of 32; both scans of the row then read only the runs that matter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._threads import kernel
from .measure import FAR, ascend, pack, sift, sq_dist, unpack

_RUN = 32


class Level(NamedTuple):
    """Rows whose products bound distances from below: ``keep * a^2 - least + 2 (half - product)``.

    Attributes:
        x, y: (N, r), (M, r); the same array if a set is searched for itself.
        norm: (N,) float64 squared lengths a^2 of the whole rows of x.
        half: (M,) ``keep / 2`` times those of y, in the type of the rows.
        keep: 1 - what roundings may add to a bound, for each unit of a^2 + b^2.
        least: what underflow may.
    """

    x: np.ndarray
    y: np.ndarray
    norm: np.ndarray
    half: np.ndarray
    keep: float
    least: float


def level_of(x: np.ndarray, y: np.ndarray, norm_x: np.ndarray, norm_y: np.ndarray, doubt: float, least: float) -> Level:
    """A level of rows whose bounds need ``doubt``, and 6 roundings of what is compared in the type of the rows."""
    keep = 1 - doubt - 3 * float(np.finfo(x.dtype).eps)
    return Level(x, y, norm_x, (keep / 2 * norm_y).astype(x.dtype), keep, least)


@kernel(fastmath={"nnan", "nsz", "reassoc"})
def _lowest(half, scores, low):
    """The least of ``half - scores`` in runs of 32."""
    m = len(half)
    whole = m // _RUN
    for c in range(whole):  # of a length that the compiler can see
        least = half[c * _RUN] - scores[c * _RUN]
        for t in range(_RUN):
            value = half[c * _RUN + t] - scores[c * _RUN + t]
            least = value if value < least else least
        low[c] = least
    if whole < len(low):
        least = half[m - 1] - scores[m - 1]
        for j in range(whole * _RUN, m):
            value = half[j] - scores[j]
            least = value if value < least else least
        low[whole] = least


@kernel(fastmath={"reassoc", "contract"})
def _dot(a, b):
    total = a[0] * b[0]
    for d in range(1, len(a)):
        total += a[d] * b[d]
    return total


@kernel
def _limit(farthest, ratio):
    """The squared distance, centred and scaled, above which a pair is not among the first k.

    Distances that round to the float32 of the farthest are ties, which the index decides.
    """
    return (np.float64(farthest) * (1.0 + 2.0**-21) + 2.0**-149) * ratio


@kernel
def _cut(limit, level, i):
    """The largest ``half - product`` with which a pair of row i may be within ``limit``."""
    cut = 0.5 * (limit - level.keep * level.norm[i] + level.least)
    return cut + abs(cut) * 2.0**-50


@kernel
def _is_among(known, count, j):
    """Whether ``j`` is one of the first ``count`` integers, ascending."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if known[middle] < j:
            low = middle + 1
        else:
            high = middle
    return low < count and known[low] == j


@kernel
def _measure(x, y, i, j, factor, best):
    """Measure a pair; it takes the place of the farthest if it comes before it."""
    key = pack(factor * sq_dist(x, y, i, j), j)
    if key < best[0]:
        sift(best, key)


@kernel
def _guess(scores, half, low, own, cut, guess):
    """The pairs of lowest bound among those below ``cut``: a heap of packed pairs."""
    guess[:] = FAR
    edge = cut
    for c in range(len(low)):
        if low[c] >= edge:
            continue
        for j in range(c * _RUN, min(len(half), c * _RUN + _RUN)):
            value = half[j] - scores[j]
            if value < edge and j != own:
                key = pack(value, j)
                if key < guess[0]:
                    sift(guess, key)
                    if guess[0] != FAR:
                        edge = np.float64(unpack(guess[0]))


@kernel
def _take(indices, own, known, count):
    """Add indices to the first ``count`` known ones, which stay ascending and without repeats; returns their number."""
    for p in range(len(indices)):
        if indices[p] >= 0 and indices[p] != own:
            known[count] = indices[p]
            count += 1
    ascend(known[:count])
    kept = 0
    for p in range(count):
        if p == 0 or known[p] != known[p - 1]:
            known[kept] = known[p]
            kept += 1
    return kept


@kernel
def nearest(begin, end, first, x, y, alone, scores, coarse, fine, ratio, factor, hint, out_dist, out_index):
    """Rows ``begin .. end - 1`` of a block of scores that starts at row ``first`` of ``x``.

    Args:
        scores: products of ``coarse.x`` and ``coarse.y``.
        fine: a second level; of width 0 for none.
        ratio, factor: what makes centred and scaled squared distances of compared ones, and compared ones of those of
            the rows as they are: both powers of two, the latter 1 unless float32 would lose the squares of tiny rows.
        hint: (N, h) int64 rows that are measured first; negative for none.

    Returns:
        How many pairs the second level bounded, and how many were measured.
    """
    k, m = out_dist.shape[1], len(y)
    others = k - 1 if alone else k  # a row's own place is not contested
    bounded, measured = 0, 0
    low = np.empty((m + _RUN - 1) // _RUN, scores.dtype)
    best, guess = np.empty(others, np.int64), np.empty(others, np.int64)
    known = np.empty(others + hint.shape[1], np.int64)
    for r in range(begin, end):
        i = first + r
        own = i if alone else -1
        if alone:
            out_dist[i, 0], out_index[i, 0] = 0.0, i
        if others == 0:
            continue
        _lowest(coarse.half, scores[r], low)
        best[:] = FAR
        hinted = _take(hint[i], own, known, 0)
        for p in range(hinted):
            _measure(x, y, i, known[p], factor, best)

        cut = _cut(_limit(unpack(best[0]), ratio), coarse, i)
        _guess(scores[r], coarse.half, low, own, cut, guess)
        for p in range(others):
            if guess[p] == FAR:
                guess[p] = -1
                continue
            guess[p] &= 0xFFFFFFFF
            if not _is_among(known, hinted, guess[p]):
                measured += 1
                _measure(x, y, i, guess[p], factor, best)
        count = _take(guess, own, known, hinted)
        measured += hinted

        farthest = best[0]
        limit = _limit(unpack(farthest), ratio)
        cut, fine_cut = _cut(limit, coarse, i), _cut(limit, fine, i)
        for c in range(len(low)):
            if low[c] > cut:
                continue
            for j in range(c * _RUN, min(m, c * _RUN + _RUN)):
                if coarse.half[j] - scores[r, j] > cut or j == own or _is_among(known, count, j):
                    continue
                if fine.x.shape[1] > 0:
                    bounded += 1
                    if fine.half[j] - _dot(fine.x[i], fine.y[j]) > fine_cut:
                        continue
                measured += 1
                _measure(x, y, i, j, factor, best)
                if best[0] != farthest:
                    farthest = best[0]
                    limit = _limit(unpack(farthest), ratio)
                    cut, fine_cut = _cut(limit, coarse, i), _cut(limit, fine, i)
            if farthest >> 32 == 0 and (farthest & 0xFFFFFFFF) < (c + 1) * _RUN:
                break  # k copies were found, and whatever follows has a higher index
        if factor != 1.0:
            for p in range(others):
                j = best[p] & 0xFFFFFFFF
                best[p] = pack(sq_dist(x, y, i, j), j)
        ascend(best)
        for p in range(others):
            out_dist[i, k - others + p] = unpack(best[p])
            out_index[i, k - others + p] = best[p] & 0xFFFFFFFF
    return bounded, measured

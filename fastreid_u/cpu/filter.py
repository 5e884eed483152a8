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
from .bfloat16 import widen
from .measure import FAR, ascend, pack, sift, sq_dist, unpack

_RUN = 32


class Level(NamedTuple):
    """Rows whose products s bound distances from below: ``keep * a^2 - least + 2 (half - s - grain |s|)``.

    Attributes:
        x, y: (N, r), (M, r); the same array if a set is searched for itself.
        norm: (N,) float64 squared lengths a^2 of the whole rows of x.
        half: (M,) ``keep / 2`` times those of y, in the type of the rows.
        keep: 1 - what roundings may add to a bound, for each unit of a^2 + b^2.
        least: what underflow may.
        grain: what rounding the product to fewer bits may, for each unit of it.
    """

    x: np.ndarray
    y: np.ndarray
    norm: np.ndarray
    half: np.ndarray
    keep: float
    least: float
    grain: np.floating


def level_of(
    x: np.ndarray, y: np.ndarray, norm_x: np.ndarray, norm_y: np.ndarray, doubt: float, least: float, grain: float = 0.0
) -> Level:
    """A level of rows whose bounds need ``doubt``, and 8 roundings of what is compared in the type of the scores.

    Scores of rows in bfloat16, for which uint16 stands, are float32.
    """
    dtype = np.float32 if x.dtype == np.uint16 else x.dtype.type
    keep = 1 - doubt - 4 * float(np.finfo(dtype).eps)
    return Level(x, y, norm_x, (keep / 2 * norm_y).astype(dtype), keep, least, dtype(grain))


def without_rows(level: Level) -> Level:
    """The bounds of a level; as a second one, it is none."""
    rows = np.empty((0, 0), level.half.dtype)
    return level._replace(x=rows, y=rows)


@kernel
def _bound(half, score, grain):
    """Half of what a score leaves of a distance at least, but for the query's own length."""
    return half - (score + grain * abs(score))


@kernel(fastmath={"nnan", "nsz"})
def _lowest(half, scores, grain, low):
    """The least bound of each run: of every 1,024 scores, run c holds c, c + 32, c + 64, ... (vectors of c)."""
    m = len(half)
    low[:] = np.inf
    for q in range(len(low) // _RUN):
        least, first = low[q * _RUN : q * _RUN + _RUN], q * _RUN * _RUN
        for start in range(first, min(first + _RUN * _RUN, m - _RUN + 1), _RUN):
            for c in range(_RUN):  # of a length that the compiler can see
                value = _bound(half[start + c], scores[start + c], grain)
                least[c] = value if value < least[c] else least[c]
    for j in range(m - m % _RUN, m):
        run = j // (_RUN * _RUN) * _RUN + j % _RUN
        low[run] = min(low[run], _bound(half[j], scores[j], grain))


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
    """The largest bound, in the terms of ``_bound``, with which a pair of row i may be within ``limit``."""
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
def _guess(scores, level, low, own, cut, guess):
    """The pairs of lowest bound among those below ``cut``: a heap of packed pairs."""
    guess[:] = FAR
    edge = cut
    for c in range(len(low)):
        if low[c] >= edge:
            continue
        first = c // _RUN * _RUN * _RUN
        for j in range(first + c % _RUN, min(len(scores), first + _RUN * _RUN), _RUN):
            value = _bound(level.half[j], scores[j], level.grain)
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
def nearest(begin, end, first, x, y, alone, scores, short, coarse, fine, ratio, factor, hint, out_dist, out_index):
    """Rows ``begin .. end - 1`` of a block of scores that starts at row ``first`` of ``x``.

    Args:
        scores: products of the coarse level's rows; none if they are in ``short``, as bfloat16.
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
    low = np.empty((m + _RUN * _RUN - 1) // (_RUN * _RUN) * _RUN, scores.dtype)
    best, guess = np.empty(others, np.int64), np.empty(others, np.int64)
    known = np.empty(others + hint.shape[1], np.int64)
    row, bits = np.empty(m, scores.dtype), np.empty(m, np.uint32)
    for r in range(begin, end):
        i = first + r
        own = i if alone else -1
        if alone:
            out_dist[i, 0], out_index[i, 0] = 0.0, i
        if others == 0:
            continue
        if len(short) > 0:
            widen(short[r], bits)
            score = row
            score[:] = bits.view(np.float32)
        else:
            score = scores[r]
        _lowest(coarse.half, score, coarse.grain, low)
        best[:] = FAR
        hinted = _take(hint[i], own, known, 0)
        for p in range(hinted):
            _measure(x, y, i, known[p], factor, best)

        cut = _cut(_limit(unpack(best[0]), ratio), coarse, i)
        _guess(score, coarse, low, own, cut, guess)
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
            first_of = c // _RUN * _RUN * _RUN
            if c % _RUN == 0 and farthest >> 32 == 0 and (farthest & 0xFFFFFFFF) < first_of:
                break  # k copies were found, and whatever follows has a higher index
            if low[c] > cut:
                continue
            for j in range(first_of + c % _RUN, min(m, first_of + _RUN * _RUN), _RUN):
                if _bound(coarse.half[j], score[j], coarse.grain) > cut or j == own or _is_among(known, count, j):
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
        if factor != 1.0:
            for p in range(others):
                j = best[p] & 0xFFFFFFFF
                best[p] = pack(sq_dist(x, y, i, j), j)
        ascend(best)
        for p in range(others):
            out_dist[i, k - others + p] = unpack(best[p])
            out_index[i, k - others + p] = best[p] & 0xFFFFFFFF
    return bounded, measured

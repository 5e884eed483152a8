# SPDX-License-Identifier: Apache-2.0
"""Ranks in a gallery without ranking it: how many of its rows come before given ones, on a CPU.

A list is scored by the places of a few rows, the matches of its query. Each is a mark, a measured distance and an
index, and its place is the number of gallery rows before it. Products of matrices bound each row's distance from both
sides; where both bounds fall between the same two marks, or beyond the last, the row is placed. The others are measured
in float64, as the marks were, so that copies of a row tie. Products come in levels (:mod:`._levels`): a short one, in
bfloat16 or in a few directions, and the full one for those queries of a block that it leaves with many rows to measure.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._levels import Side, levels
from ._threads import kernel, over_rows
from .bfloat16 import widen
from .centre import find_origin, moved
from .measure import sq_dist
from .projection import Product

_QUERIES, _CHUNK = 4096, 2048  # rows of the query, and of the gallery, in a block of scores: 32 MB
_OPEN = 24  # a query with more than 1 / _OPEN of a block in doubt goes to the next level


@kernel
def _rounded(value):
    """To 24 bits, half to even, at any exponent: float32 would lose those that it does not have."""
    bits = np.float64(value).view(np.int64)
    bits += 0x0FFFFFFF + ((bits >> 29) & 1)
    return np.int64(bits & ~0x1FFFFFFF).view(np.float64)


@kernel
def _first(values, begin, end, value, beyond):
    """The first place in ascending ``values[begin:end]`` of at least ``value``; with ``beyond``, of more."""
    while begin < end:
        middle = (begin + end) >> 1
        if values[middle] < value or (beyond and values[middle] == value):
            begin = middle + 1
        else:
            end = middle
    return begin


@kernel
def _measure(begin, end, query, gallery, row, column, distance):
    for m in range(begin, end):
        distance[m] = _rounded(sq_dist(query, gallery, row[m], column[m]))


@kernel
def _count_one(value, j, a, b, column, distance, counts):
    """Row ``j`` of the gallery, at ``value``, among the marks ``a .. b - 1``."""
    not_less = _first(distance, a, b, value, False)
    more = _first(distance, not_less, b, value, True)
    if more < b:
        counts[0, more] += 1
    later = _first(column, not_less, more, j, True)
    if later < b:
        counts[1, later] += 1
    if not_less < b:
        counts[2, not_less] += 1


@kernel
def _place(
    begin, end, at, which, scores, short, norm_q, rest_q, norm_g, rest_g, doubt, least, grain, unscale, query, gallery,
    first, start, column, distance, most, counts, undecided,
):  # fmt: skip
    """Rows ``begin .. end - 1`` of a block of scores, for ``query[which[at]]`` and ``gallery[first:]``."""
    width = len(norm_g)
    bits, of_row = np.empty(width, np.uint32), np.empty(width, scores.dtype)
    widened = bits.view(np.float32)
    lowest = np.empty(width, np.float32)  # for a quick look in float32, whose rounding 2^-20 covers
    for j in range(width):
        lowest[j] = norm_g[j] * (1.0 - doubt - 2.0**-20)
    kept, sure = np.empty(width + 1, np.int32), np.empty(width, np.int64)
    for r in range(begin, end):
        i = which[at[r]]
        a, b = start[i], start[i + 1]
        size = norm_q[at[r]]
        limit = distance[b - 1] / unscale * (1.0 + 2.0**-20) - size * (1.0 - doubt - 2.0**-20) + least
        reach, twice, slope = np.float32(limit + abs(limit) * 2.0**-20), np.float32(2.0), np.float32(2.0 * grain)
        if len(short):
            widen(short[r], bits)
            of_row[:] = widened
        else:
            of_row[:] = scores[r]
        near = 0
        for j in range(width):
            kept[near] = j
            near += lowest[j] - twice * of_row[j] - slope * abs(of_row[j]) <= reach

        placed = opened = 0
        for at_kept in range(near):
            j = kept[at_kept]
            total, s = size + norm_g[j], np.float64(of_row[j])
            middle, slack = total - 2.0 * s, doubt * total + least + 2.0 * grain * abs(s)
            # what is measured is rounded: 4 ulp of float32 on top
            p = _first(distance, a, b, (middle - slack) * unscale * (1.0 - 2.0**-22), False)
            if p == b:
                continue
            highest = middle + slack + 4.0 * rest_q[at[r]] * rest_g[j]
            if distance[p] > highest * unscale * (1.0 + 2.0**-22):
                sure[placed] = p
                placed += 1
            else:
                kept[opened] = j
                opened += 1
        undecided[r] = opened
        if opened > most:
            continue
        for c in range(placed):
            for side in range(3):
                counts[side, sure[c]] += 1
        for c in range(opened):
            j = first + kept[c]
            _count_one(_rounded(sq_dist(query, gallery, i, j)), j, a, b, column, distance, counts)


@kernel
def _count_in(begin, end, which, distmat, start, column, distance, counts):
    for r in range(begin, end):
        i = which[r]
        a, b = start[i], start[i + 1]
        last = distance[b - 1]
        for j in range(distmat.shape[1]):
            if distmat[i, j] <= last:
                _count_one(np.float64(distmat[i, j]), j, a, b, column, distance, counts)


def measure(
    query: np.ndarray, gallery: np.ndarray, row: np.ndarray, column: np.ndarray, *, threads: int = 1
) -> np.ndarray:
    """Squared distances of ``query[row]`` (float32) and ``gallery[column]``, summed in float64, rounded to 24 bits."""
    distance = np.empty(len(row))
    over_rows(_measure, len(row), threads, query, gallery, row, column, distance)
    return distance


def count_in(
    distmat: np.ndarray, start: np.ndarray, column: np.ndarray, distance: np.ndarray, *, threads: int = 1
) -> np.ndarray:
    """:func:`count` in a ready matrix of distances (Q, G), float32 or float64."""
    counts, which = np.zeros((3, len(column)), np.int64), np.flatnonzero(np.diff(start))
    over_rows(_count_in, len(which), threads, which, distmat, start, column, distance, counts, most=64)
    return _summed(counts, start)


def count(
    query: np.ndarray,
    gallery: np.ndarray,
    start: np.ndarray,
    column: np.ndarray,
    distance: np.ndarray,
    *,
    threads: int = 1,
    product: Product = np.matmul,
    dtype: type = np.float32,
    bfloat16: Callable | None = None,
) -> np.ndarray:
    """How many rows of the gallery come before each mark.

    Args:
        query, gallery: (Q, D), (G, D) float32, contiguous; G and D at least 1.
        start: (Q + 1,) int64; the marks of query i are ``start[i] .. start[i + 1] - 1``, ascending by (distance,
            column).
        column, distance: (M,) int64 and float64; distances as :func:`measure` gives them. G stands behind all rows.
        threads, product, dtype: as in :func:`.knn.knn`.
        bfloat16: ``bfloat16(a, b, out)``, if worth it, writes a b', summed in float32; uint16 stands for bfloat16.

    Returns:
        (3, M) int64: of how many rows the distance is less; less, or equal with an index below the mark's; at most it.

    Memory: a centred copy of the queries that have marks, and one of 2048 rows of the gallery; 48 MB of scores; 70 M
    bytes.
    """
    counts, which = np.zeros((3, len(column)), np.int64), np.flatnonzero(np.diff(start))
    if len(which) == 0:
        return counts
    origin = find_origin(query, gallery, threads)
    queries = moved(query if len(which) == len(query) else query[which], origin, dtype, threads)
    steps = levels(gallery, origin, product, threads, dtype, bfloat16)
    sides: list[Side | None] = [None] * len(steps)
    room = min(_QUERIES, len(which)) * min(_CHUNK, len(gallery))
    scores = {kind: np.empty(room, kind) for kind in {step.scores or np.dtype(dtype) for step in steps}}
    for first in range(0, len(gallery), _CHUNK):
        width = min(_CHUNK, len(gallery) - first)
        chunk = moved(gallery[first : first + width], origin, dtype, threads)
        of_gallery: list[Side | None] = [None] * len(steps)
        for begin in range(0, len(which), _QUERIES):
            at = np.arange(begin, min(begin + _QUERIES, len(which)))
            for n, step in enumerate(steps):
                sides[n] = sides[n] or step.side(*queries)
                of_gallery[n] = of_gallery[n] or step.side(*chunk)
                a, b = sides[n], of_gallery[n]
                block = scores[step.scores or np.dtype(dtype)][: len(at) * width].reshape(len(at), width)
                both = (np.empty((0, 0), dtype), block) if step.scores else (block, np.empty((0, 0), np.uint16))
                whole = at[-1] - at[0] + 1 == len(at)
                step.product(a.rows[at[0] : at[-1] + 1] if whole else a.rows[at], b.rows, block)
                most = width if step is steps[-1] else width // _OPEN
                opened = np.empty(len(at), np.int64)
                over_rows(
                    _place, len(at), threads, at, which, *both, queries[1], a.rest, chunk[1], b.rest,
                    step.doubt(a, b), step.least, step.grain, origin.scale**-2, query, gallery, first,
                    start, column, distance, most, counts, opened, most=64,
                )  # fmt: skip
                at = at[opened > most]
                if len(at) == 0:
                    break
    return _summed(counts, start)


def _summed(counts: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What falls before a mark, or on it, of each query's own."""
    total = np.cumsum(counts, axis=1)
    before = np.concatenate([np.zeros((3, 1), np.int64), total], axis=1)[:, start[:-1]]
    return total - np.repeat(before, np.diff(start), axis=1)

# SPDX-License-Identifier: Apache-2.0
"""The sparse half of re-ranking on a CPU: reciprocal sets of given lists, integer rows, overlaps with the gallery.

As :mod:`.k_reciprocal` encodes features for clustering, with two differences that the published re-ranking has: half
lists are counted from k1 while full lists hold k1 + 1 entries, and the distances in the weights are whatever the caller
measures. Rows weigh k2 2^w and overlaps are sums of integers, so they are the same in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ._threads import kernel, over_rows
from .jaccard import _count_prefixes, _invert
from .k_reciprocal import Rows, _average, _expand_set, _find_mutual, _weigh_fixed, bits, table_bits


class InvertedRows(NamedTuple):
    """Integer rows of all images, and for each column the gallery images that hold it.

    Attributes:
        rows: of queries and gallery; columns in no order.
        start: (n + 1,) int64, the first entry of each column's list.
        holder: int32, the place of a row in the gallery.
        list_mass: int32, the weight of the column in that row.
        weight: what a row adds up to, unless it averages rows without members.
    """

    rows: Rows
    start: np.ndarray
    holder: np.ndarray
    list_mass: np.ndarray
    weight: int


@kernel
def _collect_sets(begin, end, lists, half, mutual):
    widest = lists.shape[1] * (1 + half)
    keys = np.empty(1 << table_bits(widest), np.int32)
    place = np.empty(len(keys), np.int32)
    members = np.empty(widest, np.int64)
    indptr = np.zeros(end - begin + 1, np.int64)
    column = np.empty(64, np.int32)
    at = 0
    for i in range(begin, end):
        count = _expand_set(i, lists, half, mutual, keys, place, members)
        if at + count > len(column):
            longer = np.empty(2 * (at + count), np.int32)
            longer[:at] = column[:at]
            column = longer
        for p in range(count):
            column[at] = members[p] >> 32
            at += 1
        indptr[i - begin + 1] = at
    return indptr, column[:at].copy(), np.empty(0, np.int32)


@kernel
def _weigh(begin, end, indptr, distance, unit, mass):
    for i in range(begin, end):
        if indptr[i] < indptr[i + 1]:
            own = slice(indptr[i], indptr[i + 1])
            _weigh_fixed(distance[own], indptr[i + 1] - indptr[i], unit, mass[own])


@kernel
def _meet_gallery(begin, end, first, indptr, column, mass, start, holder, list_mass, out):
    for i in range(begin, end):
        for e in range(indptr[first + i], indptr[first + i + 1]):
            c, own = column[e], mass[e]
            for p in range(start[c], start[c + 1]):
                out[i, holder[p]] += min(own, list_mass[p])


def encode(
    ranking: np.ndarray,
    k: int,
    half: int,
    k2: int,
    num_query: int,
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    threads: int,
) -> InvertedRows:
    """Encode n images of which the first ``num_query`` are queries.

    Args:
        ranking: (n, at least k, half and k2) int32, nearest first, no repeats in a row.
        k: entries of the full lists.
        half: entries of the half lists, at most k.
        k2: rows added up in query expansion; 1 turns it off.
        num_query: at least 1 and less than n.
        measure: ``measure(row, column)`` gives the float64 distances of pairs, int64 both; weights are softmax of minus
            them.
        threads: to run on; the result does not depend on them.

    Memory: 8 bytes an entry of the encoding and 8 more for its inverted lists; 20 bytes an entry of the sets before
    query expansion; n k.
    """
    n, lists = len(ranking), np.ascontiguousarray(ranking[:, :k])
    mutual = np.empty((n, k), np.uint8)
    over_rows(_find_mutual, n, threads, lists, half, mutual)
    indptr, column, _ = Rows.put_together(over_rows(_collect_sets, n, threads, lists, half, mutual))
    row = np.repeat(np.arange(n), np.diff(indptr))
    distance = measure(row, column.astype(np.int64))
    del row
    mass = np.empty(len(column), np.int32)
    over_rows(_weigh, n, threads, indptr, distance, 1 << bits(k2), mass)
    rows = Rows(indptr, column, mass)
    if k2 > 1:
        nearest = np.ascontiguousarray(ranking[:, :k2])
        rows = Rows.put_together(over_rows(_average, n, threads, nearest, k2, *rows, np.int32(1)))

    count = np.zeros(n, np.int64)
    _count_prefixes(num_query, n, rows.indptr, rows.column, rows.indptr[1:], count)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    holder, list_mass = np.empty(start[-1], np.int32), np.empty(start[-1], np.int32)
    _invert(num_query, n, *rows, rows.indptr[1:], start[:-1].copy(), holder, list_mass)
    return InvertedRows(rows, start, holder - num_query, list_mass, k2 << bits(k2))


def overlaps(encoding: InvertedRows, first: int, last: int, gallery: int, threads: int) -> np.ndarray:
    """(last - first, gallery) int32: the sums of minima of these rows and of every gallery row."""
    out = np.zeros((last - first, gallery), np.int32)
    over_rows(_meet_gallery, last - first, threads, first, *encoding.rows, *encoding[1:4], out)
    return out

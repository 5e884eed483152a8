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
from .k_reciprocal import average_rows, expand_set, mutual_neighbours, weigh_fixed
from .measure import sq_dist
from .rows import Rows, bits, invert, row_weight, table_bits


class InvertedRows(NamedTuple):
    """Integer rows of all images, and for each column the gallery images that hold it.

    Attributes:
        rows: of queries and gallery; columns in no order.
        start: (n + 1,) int64, the first entry of each column's list.
        holder: int32, the place of a row in the gallery.
        list_mass: int32, the mass of the column in that row.
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
        count = expand_set(i, lists, half, mutual, keys, place, members)
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
def _measure(begin, end, x, row, column, found):
    for p in range(begin, end):
        found[p] = sq_dist(x, x, row[p], column[p])


@kernel
def _weigh(begin, end, indptr, distance, unit, mass):
    for i in range(begin, end):
        if indptr[i] < indptr[i + 1]:
            own = slice(indptr[i], indptr[i + 1])
            weigh_fixed(distance[own], indptr[i + 1] - indptr[i], unit, mass[own])


@kernel
def _meet_gallery(begin, end, first, indptr, column, mass, start, holder, list_mass, out):
    for i in range(begin, end):
        for e in range(indptr[first + i], indptr[first + i + 1]):
            c, own = column[e], mass[e]
            for p in range(start[c], start[c + 1]):
                out[i, holder[p]] += min(own, list_mass[p])


def measure(x: np.ndarray, row: np.ndarray, column: np.ndarray, *, threads: int) -> np.ndarray:
    """Squared distances of ``x[row]`` (float32) and ``x[column]``, summed in float64: float64."""
    found = np.empty(len(row))
    over_rows(_measure, len(row), threads, x, row, column, found)
    return found


def encode(
    ranking: np.ndarray,
    k: int,
    half: int,
    averaged: np.ndarray,
    num_query: int,
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    threads: int,
) -> InvertedRows:
    """Encode n images of which the first ``num_query`` are queries.

    Args:
        ranking: (n, at least k and half) int32, nearest first, no repeats in a row.
        k: entries of the full lists.
        half: entries of the half lists, at most k.
        averaged: (n, k2) int32, the rows that query expansion adds up, alike for copies; a k2 of 1 turns it off.
        num_query: at least 1 and less than n.
        measure: ``measure(row, column)`` gives the float64 distances of pairs, int64 both; weights are softmax of minus
            them.
        threads: to run on; the result does not depend on them.

    Memory: 8 bytes an entry of the encoding and 8 more for its inverted lists; 20 bytes an entry of the sets before
    query expansion; n k.
    """
    n, k2, lists = len(ranking), averaged.shape[1], np.ascontiguousarray(ranking[:, :k])
    mutual = mutual_neighbours(lists, half, threads)
    indptr, column, _ = Rows.put_together(over_rows(_collect_sets, n, threads, lists, half, mutual))
    row = np.repeat(np.arange(n), np.diff(indptr))
    distance = measure(row, column.astype(np.int64))
    del row
    mass = np.empty(len(column), np.int32)
    over_rows(_weigh, n, threads, indptr, distance, 1 << bits(k2), mass)
    rows = Rows(indptr, column, mass)
    if k2 > 1:
        rows = average_rows(rows, np.ascontiguousarray(averaged), k2, threads)

    start, holder, list_mass = invert(rows, rows.indptr[1:], num_query)
    return InvertedRows(rows, start, holder - num_query, list_mass, row_weight(k2))


def overlaps(index: InvertedRows, first: int, last: int, gallery: int, threads: int) -> np.ndarray:
    """(last - first, gallery) int32: the sums of minima of these rows and of every gallery row."""
    out = np.zeros((last - first, gallery), np.int32)
    over_rows(_meet_gallery, last - first, threads, first, *index.rows, *index[1:4], out)
    return out

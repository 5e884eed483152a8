# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal encoding on a CPU, in fixed point for what compares rows, in float32 as published for what reads them.

In fixed point a row of V is made of integers that sum to exactly 2^w, and query expansion adds k2 rows and does not
divide, so every row weighs k2 2^w. Overlaps of rows are then sums of integers: the same in any order, symmetric, and
right where float32 is decided by rounding (two points that share m of their k2 rows and nothing else are exactly
1 - m / (2 k2 - m) apart). Zhong et al., CVPR 2017, sections 3.2 to 3.4.
"""

from __future__ import annotations

import numpy as np

from ._threads import kernel, over_rows
from .measure import ascend, sq_dist
from .rows import Rows, bits, find_slot, sort_rows, table_bits


@kernel
def _find_mutual(begin, end, lists, half, mutual):
    """``mutual[i, a]``: 0 if i is not in the list of its neighbour ``lists[i, a]``, 1 if it is, 2 if in both halves."""
    for i in range(begin, end):
        for a in range(lists.shape[1]):
            j = lists[i, a]
            mutual[i, a] = 0
            for b in range(lists.shape[1]):
                if lists[j, b] == i:
                    mutual[i, a] = 2 if a < half and b < half else 1
                    break


@kernel(fastmath={"reassoc", "contract"})
def _dot(x, i, j):
    total = 0.0
    for d in range(x.shape[1]):
        total += np.float64(x[i, d]) * np.float64(x[j, d])
    return total


@kernel
def _distance(x, i, j, compat):
    return 2.0 - 2.0 * _dot(x, i, j) if compat else sq_dist(x, x, i, j)


@kernel
def _measure_mutual(begin, end, x, lists, mutual, compat, first, last, distance):
    """``distance[i - first, a]`` of mutual neighbours of the rows ``first .. last - 1``.

    A pair of these rows is measured once: the smaller writes both places.
    """
    for i in range(begin, end):
        for a in range(lists.shape[1]):
            j = lists[i, a]
            if mutual[i, a] == 0 or first <= j < i:
                continue
            found = _distance(x, i, j, compat)
            if i < j < last:
                for b in range(lists.shape[1]):
                    if lists[j, b] == i:
                        distance[j - first, b] = found
            distance[i - first, a] = found


@kernel
def expand_set(i, lists, half, mutual, keys, place, members):
    """Write the expanded reciprocal set of i to ``members``, ascending; return its size.

    A member is ``j << 32 | a`` if ``j = lists[i, a]`` is a mutual neighbour, ``j << 32 | k1`` if expansion brought it.
    """
    added = lists.shape[1]
    keys[:] = -1
    count = 0
    for a in range(lists.shape[1]):
        if mutual[i, a]:
            slot = find_slot(keys, lists[i, a])
            if keys[slot] == -1:
                keys[slot], place[slot], members[count] = lists[i, a], count, np.int64(lists[i, a]) << 32 | a
                count += 1
    original = count
    for p in range(original):
        q = members[p] >> 32
        size = inside = 0
        for b in range(half):
            if mutual[q, b] == 2:
                slot = find_slot(keys, lists[q, b])
                size += 1
                inside += keys[slot] != -1 and place[slot] < original  # those that came later do not count
        if 3 * inside > 2 * size:  # in integers, so 2/3 itself is out
            for b in range(half):
                if mutual[q, b] == 2:
                    slot = find_slot(keys, lists[q, b])
                    if keys[slot] == -1:
                        keys[slot], place[slot], members[count] = (
                            lists[q, b],
                            count,
                            np.int64(lists[q, b]) << 32 | added,
                        )
                        count += 1
    ascend(members[:count])
    return count


@kernel
def weigh_fixed(distance, count, unit, out):
    """Softmax of minus the distances as integers that sum to ``unit``: rounded running sums, less the one before."""
    nearest = distance[:count].min()
    total = 0.0
    for p in range(count):
        distance[p] = np.exp(nearest - distance[p])
        total += distance[p]
    running, before = 0.0, 0
    for p in range(count):
        running += distance[p]
        upto = unit if p == count - 1 else np.int64(np.rint(running / total * unit))
        out[p] = upto - before
        before = upto


@kernel
def _weigh_float32(distance, count, out):
    """The softmax as published: float32 throughout, terms added in ascending order of columns."""
    nearest = np.float32(distance[:count].min())
    total = np.float32(0)
    for p in range(count):
        out[p] = np.exp(nearest - np.float32(distance[p]))
        total += out[p]
    for p in range(count):
        out[p] /= total


@kernel
def _encode(begin, end, x, lists, half, mutual, measured, first, compat, unit, like):
    """Rows of V: counts, columns ascending, masses of ``like``'s type; in fixed point if ``unit`` is not 0.

    ``measured`` begins with row ``first``.
    """
    widest = lists.shape[1] * (1 + half)
    keys = np.empty(1 << table_bits(widest), np.int32)
    place = np.empty(len(keys), np.int32)
    members = np.empty(widest, np.int64)
    distance = np.empty(widest)
    weight = np.empty(widest, like.dtype)
    indptr = np.zeros(end - begin + 1, np.int64)
    column = np.empty((end - begin) * widest, np.int32)
    mass = np.empty((end - begin) * widest, like.dtype)
    at = 0
    for i in range(begin, end):
        count = expand_set(i, lists, half, mutual, keys, place, members)
        for p in range(count):
            j, a = members[p] >> 32, members[p] & 0xFFFFFFFF
            distance[p] = measured[i - first, a] if a < lists.shape[1] else _distance(x, i, j, compat)
        if count and unit:
            weigh_fixed(distance, count, unit, weight)
        elif count:
            _weigh_float32(distance, count, weight)
        for p in range(count):
            if weight[p] != 0:
                column[at], mass[at] = members[p] >> 32, weight[p]
                at += 1
        indptr[i - begin + 1] = at
    return indptr, column[:at].copy(), mass[:at].copy()


@kernel
def _find_first_copies(begin, end, x, lists, first):
    for i in range(begin, end):
        j = lists[i, 1] if lists[i, 0] == i else i
        first[i] = j if j < i and np.float32(sq_dist(x, x, i, j)) == 0 else i


def averaged_lists(x: np.ndarray, lists: np.ndarray, k2: int, threads: int) -> np.ndarray:
    """(N, k2) int32: the rows that query expansion averages, the first ``k2`` by (distance, index); ``k2`` above 1.

    ``lists`` has the row itself before its copies. The copy of the lowest index has no copy to overtake, so its list is
    in that order, and it is the list of all of them, also where more copies than k1 drive a row out of its own.
    """
    first = np.empty(len(lists), np.int32)
    over_rows(_find_first_copies, len(lists), threads, x, lists, first)
    return lists[first, :k2]


@kernel
def _average(begin, end, lists, k2, indptr, column, mass, divisor):
    """Rows of query expansion: sums, in rank order, over the first ``k2`` neighbours, divided; columns unordered."""
    widest = total = 0
    for i in range(begin, end):
        width = 0
        for a in range(k2):
            width += indptr[lists[i, a] + 1] - indptr[lists[i, a]]
        widest = max(widest, width)
        total += width
    keys = np.full(1 << table_bits(widest), -1, np.int32)
    place = np.empty(len(keys), np.int64)
    slots = np.empty(widest, np.int64)
    out_indptr = np.zeros(end - begin + 1, np.int64)
    out_column = np.empty(total, np.int32)
    out_mass = np.empty(total, mass.dtype)
    at = 0
    for i in range(begin, end):
        first = at
        for a in range(k2):
            for e in range(indptr[lists[i, a]], indptr[lists[i, a] + 1]):
                slot = find_slot(keys, column[e])
                if keys[slot] == -1:
                    keys[slot], place[slot], slots[at - first] = column[e], at, slot
                    out_column[at], out_mass[at] = column[e], mass[e]
                    at += 1
                else:
                    out_mass[place[slot]] += mass[e]
        for p in range(at - first):
            keys[slots[p]] = -1
        if divisor != 1:
            for p in range(first, at):
                out_mass[p] /= divisor
        out_indptr[i - begin + 1] = at
    return out_indptr, out_column[:at].copy(), out_mass[:at].copy()


def half_length(k1: int) -> int:
    """Entries of the half list. np.around rounds halves to even, as published: k1 = 25 gives 12 + 1."""
    return int(np.around(k1 / 2)) + 1


def mutual_neighbours(lists: np.ndarray, half: int, threads: int, rows: range | None = None) -> np.ndarray:
    """(len(rows), k1) uint8, of all rows if None: 0 if the row is not in its neighbour's list, 1 if it is, 2 if each is
    in the half list of the other, its first ``half`` entries."""
    rows = range(len(lists)) if rows is None else rows
    mutual = np.empty(lists.shape, np.uint8)  # the system gives no memory for pages that are never written
    over_rows(_find_mutual, rows.stop, threads, lists, half, mutual, begin=rows.start)
    return mutual[rows.start : rows.stop]


def soft_rows(
    x: np.ndarray,
    lists: np.ndarray,
    mutual: np.ndarray,
    k2: int,
    *,
    compat: bool,
    fixed: bool,
    threads: int,
    rows: range | None = None,
) -> Rows:
    """The given rows of V, before query expansion; columns ascend. ``mutual`` is of all rows, the rest as in
    :func:`encode`."""
    rows = range(len(lists)) if rows is None else rows
    k1, half = lists.shape[1], half_length(lists.shape[1])
    like, unit = (np.empty(0, np.int32), 1 << bits(k2)) if fixed else (np.empty(0, np.float32), 0)
    measured = np.empty((len(rows), k1))
    given = x, lists, mutual, compat, rows.start, rows.stop, measured
    over_rows(_measure_mutual, rows.stop, threads, *given, begin=rows.start)
    most = max(1, 2**20 // (k1 * (1 + half)))  # a block's buffers: 8 MB
    given = x, lists, half, mutual, measured, rows.start, compat, unit, like
    parts = over_rows(_encode, rows.stop, threads, *given, most=most, begin=rows.start)
    del measured, given
    return Rows.put_together(parts, like.dtype)


def average_rows(v: Rows, lists: np.ndarray, k2: int, threads: int, rows: range | None = None) -> Rows:
    """The given rows of V after query expansion, columns unordered: integers are added, float32 is averaged.

    ``v``: all rows. Not for ``k2`` = 1.
    """
    rows = range(len(lists)) if rows is None else rows
    divisor = v.mass.dtype.type(1 if v.mass.dtype == np.int32 else k2)
    parts = over_rows(_average, rows.stop, threads, lists, k2, *v, divisor, begin=rows.start)
    return Rows.put_together(parts, v.mass.dtype)


def encode(x: np.ndarray, lists: np.ndarray, k2: int, *, compat: bool, fixed: bool, threads: int) -> Rows:
    """V after query expansion; columns ascend if ``k2`` is 1 and have no order otherwise.

    Args:
        x: (N, D) float32, contiguous, N > 0.
        lists: (N, k1) int32, nearest first, the row itself before its copies.
        k2: rows averaged, at most k1.
        compat: weigh by 2 - 2 x.y instead of the squared distance.
        fixed: integers, every row that has members summing to 2^w before query expansion, w = ``bits(k2)``; else the
            published float32 arithmetic: distances are summed in float64 and rounded once, weights and all further
            sums, in rank order, are float32.
        threads: to run on; the result does not depend on them.
    """
    mutual = mutual_neighbours(lists, half_length(lists.shape[1]), threads)
    v = soft_rows(x, lists, mutual, k2, compat=compat, fixed=fixed, threads=threads)
    del mutual
    return v if k2 == 1 else average_rows(v, averaged_lists(x, lists, k2, threads), k2, threads)


def k_reciprocal_encoding(x: np.ndarray, lists: np.ndarray, k2: int, *, compat: bool = False, threads: int = 1) -> Rows:
    """:func:`encode` in the published float32 arithmetic, columns ascending.

    Memory beside the result: 9 N k1 bytes, or 4 N k2 and V before query expansion.
    """
    rows = encode(x, lists, k2, compat=compat, fixed=False, threads=threads)
    sort_rows(rows, np.arange(len(x), dtype=np.int32), threads)
    return rows

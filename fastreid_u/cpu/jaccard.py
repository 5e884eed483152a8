# SPDX-License-Identifier: Apache-2.0
"""Near pairs in Jaccard distance on a CPU, by a similarity join of integer rows over inverted lists of their prefixes.

Rows have weight W and overlap T = sum of min; their distance is J(T) = 1 - T / (2 W - T). So J <= radius is
T >= T_min, an integer, found once with the very expression that stores J: rounding never decides a pair.

The filter: order columns by how many rows hold them, rare first, and call the shortest head of a row whose remaining
tail weighs at most ``tail`` its prefix. Let T_ij >= T_min and a be where the earlier of the two prefixes ends. Columns
that i and j share up to a are in both prefixes; the others are in the tail of the row whose prefix ends at a, so they
add at most ``tail``. Hence the overlap of the prefixes is at least T_min - tail. Lists of prefixes are short, for the
columns that many rows share, hubs, come last in every row; the pairs that pass are measured on the whole rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._threads import kernel, over_rows
from .k_reciprocal import encode
from .measure import ascend
from .rows import Rows, find_slot, invert, row_weight, sort_rows, table_bits

# Share of T_min that the tail may weigh. The work is flat between 0.5 and 0.7.
_TAIL = 0.7


def to_distance(overlap: np.ndarray, weight: int) -> np.ndarray:
    """J of integer overlaps of rows of this weight, float32: both sides of the fraction are exact, it is rounded once
    in float64 and once on storing, so it never rises with the overlap and is 0 for equal rows only."""
    distance = np.empty(np.shape(overlap), np.float32)
    for start in range(0, distance.size, 2**20):  # float64 a piece at a time
        part = overlap[start : start + 2**20].astype(np.float64)
        distance[start : start + 2**20] = 2 * (weight - part) / (2 * weight - part)
    return distance


def least_overlap(radius: float, weight: int) -> int:
    """The smallest overlap T with float32 J(T) <= float32(radius) and J(T) < 1."""
    low, high = 1, weight  # J(weight) = 0 fits
    while low < high:
        middle = (low + high) // 2
        distance = to_distance(np.array([middle]), weight)[0]
        if distance <= np.float32(radius) and distance < 1:
            high = middle
        else:
            low = middle + 1
    return low


class Index(NamedTuple):
    """Integer rows with their columns renamed rare first, and the inverted lists of the prefixes.

    Attributes:
        indptr, column, mass: the rows; columns ascend.
        stop: (N,) int64, where the row's prefix ends.
        start: (N + 1,) int64, the first entry of each column's list.
        row: int32, ascending within a list.
        list_mass: int32, the mass of the column in that row.
        enough: overlap of prefixes that a near pair has at least.
        need: overlap that makes a pair near.
        weight: of a row; a row that averages empty ones weighs less.
    """

    indptr: np.ndarray
    column: np.ndarray
    mass: np.ndarray
    stop: np.ndarray
    start: np.ndarray
    row: np.ndarray
    list_mass: np.ndarray
    enough: int
    need: int
    weight: int


@kernel
def _count_columns(column, count):
    for e in range(len(column)):
        count[column[e]] += 1


@kernel
def _find_prefixes(begin, end, indptr, mass, tail, stop):
    for i in range(begin, end):
        left, e = 0, indptr[i + 1]
        while e > indptr[i] and left + mass[e - 1] <= tail:
            e -= 1
            left += mass[e]
        stop[i] = e


def build_index(rows: Rows, weight: int, need: int, threads: int) -> Index:
    """Rename the columns of ``rows`` in place and index the prefixes for pairs that overlap by ``need`` or more."""
    sort_rows(rows, rare_first(count_columns(rows)), threads)
    return index_sorted(rows, weight, need, threads)


def count_columns(rows: Rows, n: int | None = None) -> np.ndarray:
    """(n,) int64: how many of ``rows`` hold each column; as many columns as rows if None."""
    count = np.zeros(len(rows.indptr) - 1 if n is None else n, np.int64)
    _count_columns(rows.column, count)
    return count


def rare_first(count: np.ndarray) -> np.ndarray:
    """(N,) int32: the new name of each column, from 0 for the one that the fewest rows hold."""
    name = np.empty(len(count), np.int32)
    name[np.argsort(count, kind="stable")] = np.arange(len(count), dtype=np.int32)
    return name


def index_sorted(rows: Rows, weight: int, need: int, threads: int) -> Index:
    """:func:`build_index` of rows whose columns have their new names already and ascend."""
    n = len(rows.indptr) - 1
    # a pair may be so far apart and still near that prefixes are whole rows anyway: then leave nothing to be measured
    tail = int(_TAIL * need) if need > weight // 8 else 0
    stop = np.empty(n, np.int64)
    over_rows(_find_prefixes, n, threads, rows.indptr, rows.mass, tail, stop)
    return Index(*rows, stop, *invert(rows, stop), need - tail, need, weight)


@kernel
def overlap(index, i, j):
    """T of rows i and j, whole."""
    p, q = index.indptr[i], index.indptr[j]
    p_end, q_end = index.indptr[i + 1], index.indptr[j + 1]
    total = 0
    while p < p_end and q < q_end:
        a, b = index.column[p], index.column[q]
        if a == b:
            total += min(index.mass[p], index.mass[q])
        p += a <= b
        q += b <= a
    return total


@kernel
def table_for(index, i, keys):
    """Log2 of the table that the rows met by row i fill at most by half; the columns it meets bound them."""
    met = 0
    for e in range(index.indptr[i], index.stop[i]):
        c = index.column[e]
        met += index.start[c + 1] - index.start[c]
    return max(table_bits(min(met, len(index.stop))), table_bits(len(keys) // 2))


@kernel
def meet(keys, sums, slots, met, j, mass):
    """Add ``mass`` to what row j shares; return how many rows have been met."""
    slot = find_slot(keys, j)
    if keys[slot] == -1:
        keys[slot], sums[slot], slots[met] = j, mass, slot
        return met + 1
    sums[slot] += mass
    return met


@kernel
def _join(begin, end, index):
    """For each row i its near rows j <= i, ascending, with their overlaps."""
    keys, sums, slots = np.full(8, -1, np.int32), np.empty(8, np.int32), np.empty(8, np.int64)
    near = np.empty(64, np.int64)  # j << 32 | overlap
    column, shared = np.empty(1024, np.int32), np.empty(1024, np.int32)
    indptr = np.zeros(end - begin + 1, np.int64)
    at = 0
    for i in range(begin, end):
        # Walk the lists of the columns in row i's prefix, and add up what it shares with each earlier row met there.
        size = 1 << table_for(index, i, keys)
        if size > len(keys):
            keys, sums, slots = np.full(size, -1, np.int32), np.empty(size, np.int32), np.empty(size, np.int64)
        met = 0
        for p in range(index.indptr[i], index.stop[i]):
            c, own = index.column[p], index.mass[p]
            for e in range(index.start[c], index.start[c + 1]):
                j = index.row[e]
                if j >= i:  # lists ascend, and the later row of a pair measures it
                    break
                met = meet(keys, sums, slots, met, j, min(own, index.list_mass[e]))

        # Rows whose prefixes share enough are near if the whole rows do. The slots are emptied on the way.
        if met + 1 > len(near):
            near = np.empty(2 * (met + 1), np.int64)
        found = 0
        for s in range(met):
            slot = slots[s]
            j, t = np.int64(keys[slot]), np.int64(sums[slot])
            keys[slot] = -1
            if t < index.enough:
                continue
            if index.enough < index.need:  # else the prefixes are whole rows, and t is all they share
                t = overlap(index, i, j)
            if t >= index.need:
                near[found] = (j << 32) | t
                found += 1
        t = index.mass[index.indptr[i] : index.indptr[i + 1]].sum()  # the diagonal: nothing, if the row is empty
        if t >= index.need:
            near[found] = (np.int64(i) << 32) | t
            found += 1
        ascend(near[:found])

        # Append row i to the result, which doubles when it is full.
        if at + found > len(column):
            room = max(2 * len(column), at + found)
            longer, wider = np.empty(room, np.int32), np.empty(room, np.int32)
            longer[:at], wider[:at] = column[:at], shared[:at]
            column, shared = longer, wider
        for s in range(found):
            column[at], shared[at] = near[s] >> 32, near[s] & 0xFFFFFFFF
            at += 1
        indptr[i - begin + 1] = at
    return indptr, column[:at].copy(), shared[:at].copy()


@kernel
def _mirror(indptr, column, shared, at, out_column, out_shared):
    """Each row's own half, then what later rows say of it; both ascend. ``at``: where the rows of the result begin."""
    for i in range(len(indptr) - 1):
        for e in range(indptr[i], indptr[i + 1]):
            out_column[at[i]], out_shared[at[i]] = column[e], shared[e]
            at[i] += 1
        for e in range(indptr[i], indptr[i + 1]):
            j = column[e]
            if j != i:
                out_column[at[j]], out_shared[at[j]] = i, shared[e]
                at[j] += 1


def jaccard_graph(
    x: np.ndarray, lists: np.ndarray, k2: int, radius: float, *, compat: bool = False, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs with J <= float32(radius) and J < 1: row pointers (N + 1,) int64, columns int64, distances float32.

    Args:
        x: (N, D) float32, contiguous, N > 0.
        lists: (N, k1) int32, nearest first.
        k2, compat, threads: as in :func:`encode`.
        radius: in [0, 1].

    Columns ascend, the diagonal is stored (unless a row is empty), equal distances both ways. Memory beside the result:
    the encoding and its inverted lists, 8 bytes an entry each and some hundred entries a row, and half the result
    again while its halves are put together.
    """
    n, weight = len(x), row_weight(k2)
    rows = encode(x, lists, k2, compat=compat, fixed=True, threads=threads)
    index = build_index(rows, weight, least_overlap(radius, weight), threads)
    del rows
    half = Rows.put_together(over_rows(_join, n, threads, index, most=1024))
    del index

    count = np.diff(half.indptr)
    _count_columns(half.column, count)
    diagonal = half.indptr[1:] > half.indptr[:-1]
    last = half.indptr[1:][diagonal] - 1
    count[diagonal] -= half.column[last] == np.flatnonzero(diagonal)  # counted as row and as column
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    column, shared = np.empty(indptr[-1], np.int64), np.empty(indptr[-1], np.int32)
    _mirror(*half, indptr[:-1].copy(), column, shared)
    del half
    return indptr, column, to_distance(shared, weight)

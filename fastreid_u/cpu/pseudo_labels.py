# SPDX-License-Identifier: Apache-2.0
"""DBSCAN in Jaccard distance on a CPU without its graph: no edge is stored, so no data can make them too many.

The labels need only who is core, how cores hang together, and the few neighbours of the others:

1. Measure each row against its nearest neighbours. That finds nearly all cores and nearly all of their links.
2. Rows still in doubt meet every row that can be near and stop at ``min_samples``; if they do not get there, they are
   not core and keep the neighbours found, fewer than ``min_samples - 1``.
3. Join cores over the links. A column whose cores are in one set cannot tell sets apart, so only the others are walked,
   and only for rows of another set: two cores in different sets share no other column, so what they share there is
   complete. Each set is met at most once a row. On real data this step proves that nothing was missed.

A cluster's number is the rank of its smallest core, a border row takes the smallest number among its core neighbours:
the labels of scikit-learn (Ester et al., KDD 1996). If all features collapse to one point, step 1 joins all of them and
step 3 has no column to walk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._threads import kernel, over_rows
from .jaccard import Index, build_index, is_near, least_overlap, meet, table_for
from .k_reciprocal import bits, encode

# Nearest neighbours measured in step 1, beside the row itself. Twelve find nearly every core of the usual settings; a
# larger ``min_samples`` takes twice as many as it asks for, up to the bits of a hit mask.
_NEAREST, _MOST_NEAREST = 12, 63

_NOT_CORE, _MIXED = -1, -2


@kernel
def _measure_nearest(begin, end, index, lists, nearest, hits, count):
    """``hits[i]``: bit a says that neighbour a is near; ``count[i]``: how many, the row itself included."""
    for i in range(begin, end):
        found, count[i] = 0, 1
        for a in range(nearest):
            j = lists[i, a]
            if j != i and is_near(index, i, j):
                found |= 1 << a
                count[i] += 1
        hits[i] = found


@kernel
def _settle(begin, end, index, doubtful, min_samples, core):
    """Whether the rows ``doubtful[begin:end]`` are core; the neighbours of those that are not, row by row."""
    keys, sums, slots = np.full(8, -1, np.int32), np.empty(8, np.int32), np.empty(8, np.int64)
    indptr = np.zeros(end - begin + 1, np.int64)
    near = np.empty(1024, np.int32)
    at = 0
    for r in range(begin, end):
        i = doubtful[r]
        size = 1 << table_for(index, i, keys)
        if size > len(keys):
            keys, sums, slots = np.full(size, -1, np.int32), np.empty(size, np.int32), np.empty(size, np.int64)
        met = 0
        for p in range(index.indptr[i], index.stop[i]):
            c, own = index.column[p], index.value[p]
            for e in range(index.start[c], index.start[c + 1]):
                if index.row[e] != i:
                    met = meet(keys, sums, slots, met, index.row[e], min(own, index.mass[e]))

        first, found = at, 1
        for s in range(met):
            slot = slots[s]
            j = keys[slot]
            keys[slot] = -1
            if found >= min_samples or sums[slot] < index.enough or not is_near(index, i, j):
                continue
            found += 1
            if at == len(near):
                longer = np.empty(2 * at, np.int32)
                longer[:at] = near
                near = longer
            near[at] = j
            at += 1
        core[i] = found >= min_samples
        if core[i]:
            at = first
        indptr[r - begin + 1] = at
    return indptr, near[:at].copy()


@kernel
def _find_root(parent, i):
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@kernel
def _unite(parent, i, j):
    """The smaller root becomes the parent, so a set's root is its smallest member."""
    i, j = _find_root(parent, i), _find_root(parent, j)
    parent[max(i, j)] = min(i, j)


@kernel
def _link_nearest(lists, nearest, hits, core, parent):
    for i in range(len(parent)):
        if core[i]:
            for a in range(nearest):
                if hits[i] >> a & 1 and core[lists[i, a]]:
                    _unite(parent, i, lists[i, a])


@kernel
def _link_pairs(pairs, parent):
    for p in range(0, len(pairs), 2):
        _unite(parent, pairs[p], pairs[p + 1])


@kernel
def _find_sets(begin, end, parent, core, group):
    for i in range(begin, end):
        root = i
        while parent[root] != root:
            root = parent[root]
        group[i] = root if core[i] else _NOT_CORE


@kernel
def _compare_columns(begin, end, index, group, sets):
    """``sets[c]``: the set of all cores in the list of column c, or that they are of several, or that there is none."""
    for c in range(begin, end):
        sets[c] = _NOT_CORE
        for e in range(index.start[c], index.start[c + 1]):
            g = group[index.row[e]]
            if g == _NOT_CORE or g == sets[c]:
                continue
            if sets[c] != _NOT_CORE:
                sets[c] = _MIXED
                break
            sets[c] = g


@kernel
def _bridge(begin, end, index, group, sets):
    """Pairs (i, j), flat, that link the set of core i to another."""
    keys, sums, slots = np.full(8, -1, np.int32), np.empty(8, np.int32), np.empty(8, np.int64)
    pairs, at = np.empty(64, np.int32), 0
    for i in range(begin, end):
        if group[i] == _NOT_CORE:
            continue
        size = 1 << table_for(index, i, keys)
        if size > len(keys):
            keys, sums, slots = np.full(size, -1, np.int32), np.empty(size, np.int32), np.empty(size, np.int64)
        met = 0
        for p in range(index.indptr[i], index.stop[i]):
            c, own = index.column[p], index.value[p]
            if sets[c] != _MIXED:
                continue
            for e in range(index.start[c], index.start[c + 1]):
                j = index.row[e]
                if j >= i:
                    break
                if group[j] != _NOT_CORE and group[j] != group[i]:
                    met = meet(keys, sums, slots, met, j, min(own, index.mass[e]))

        first = at
        for s in range(met):
            slot = slots[s]
            j = keys[slot]
            keys[slot] = -1
            if sums[slot] < index.enough:
                continue
            known = False
            for p in range(first, at, 2):
                known |= group[pairs[p + 1]] == group[j]
            if known or not is_near(index, i, j):
                continue
            if at == len(pairs):
                longer = np.empty(2 * at, np.int32)
                longer[:at] = pairs
                pairs = longer
            pairs[at], pairs[at + 1] = i, j
            at += 2
    return pairs[:at].copy()


@kernel
def _label_borders(rows, indptr, near, group, labels):
    for r in range(len(rows)):
        if group[rows[r]] != _NOT_CORE:
            continue
        least = -1
        for e in range(indptr[r], indptr[r + 1]):
            if group[near[e]] != _NOT_CORE and (least == -1 or labels[near[e]] < least):
                least = labels[near[e]]
        labels[rows[r]] = least


def cluster(index: Index, lists: np.ndarray, min_samples: int, threads: int) -> np.ndarray:
    """(N,) int64 labels of the rows of ``index``; ``lists`` (N, k) int32 ranks their neighbours, as hints."""
    n, k1 = lists.shape
    nearest = min(k1, max(_NEAREST, min(2 * min_samples, _MOST_NEAREST - 1)) + 1)
    hits, count, core = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.bool_)
    over_rows(_measure_nearest, n, threads, index, lists, nearest, hits, count, most=1024)
    np.greater_equal(count, min_samples, out=core)
    doubtful = np.flatnonzero(~core).astype(np.int32)
    settled = over_rows(_settle, len(doubtful), threads, index, doubtful, min_samples, core, most=1024)

    parent, group, sets = np.arange(n, dtype=np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
    _link_nearest(lists, nearest, hits, core, parent)
    over_rows(_find_sets, n, threads, parent, core, group)
    over_rows(_compare_columns, n, threads, index, group, sets)
    for pairs in over_rows(_bridge, n, threads, index, group, sets, most=1024):
        _link_pairs(pairs, parent)
    over_rows(_find_sets, n, threads, parent, core, group)

    number = np.cumsum(group == np.arange(n)) - 1  # of the cluster that starts at a row
    labels = np.where(core, number[group], -1)
    begin = 0
    for indptr, near in settled:
        rows = doubtful[begin : begin + len(indptr) - 1]
        begin += len(rows)
        _label_borders(rows, indptr, near, group, labels)
    return labels


def pseudo_labels(
    x: np.ndarray,
    lists: np.ndarray,
    k2: int,
    eps: Sequence[float],
    min_samples: int,
    *,
    compat: bool = False,
    threads: int = 1,
) -> np.ndarray:
    """(len(eps), N) int64 labels, those of DBSCAN on the graph that :func:`jaccard_graph` would make.

    Args:
        x: (N, D) float32, contiguous, N > 0.
        lists: (N, k1) int32, nearest first.
        k2, compat, threads: as in :func:`encode`.
        eps: each in (0, 1), compared as float32(J) <= float32(eps).
        min_samples: near rows, the row itself included, that make a core.

    Memory: the encoding and its inverted lists, 8 bytes an entry each and some hundred entries a row; while they are
    built also V before query expansion; about 40 N for the clustering.
    """
    weight = k2 << bits(k2)
    need = [least_overlap(e, weight) for e in eps]
    rows = encode(x, lists, k2, compat=compat, fixed=True, threads=threads)
    index = build_index(rows, weight, min(need), threads)  # what the widest eps lets pass, the others do as well
    return np.stack([cluster(index._replace(need=t), lists, min_samples, threads) for t in need])

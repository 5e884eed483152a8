# SPDX-License-Identifier: Apache-2.0
"""The steps of DBSCAN without its graph in numba, by ranges of rows, for the labels that ranks make together.

One process alone runs the same algorithm in C++ (csrc/pseudo_labels.h); what ranks exchange between the steps has to be
had one step at a time. No edge is stored, so no data can make them too many.

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

import numpy as np

from ._threads import kernel
from .jaccard import meet, table_for

# Nearest neighbours measured in step 1, beside the row itself. Twelve find nearly every core of the usual settings; a
# larger ``min_samples`` takes twice as many as it asks for, up to the bits of a hit mask.
NEAREST, MOST_NEAREST = 12, 63

_NOT_CORE, MIXED = -1, -2


@kernel
def is_near(index, i, j):
    """Whether T of rows i and j reaches ``need``: as :func:`overlap`, but it stops when that is settled."""
    p, q = index.indptr[i], index.indptr[j]
    p_end, q_end = index.indptr[i + 1], index.indptr[j + 1]
    total, spare = 0, index.weight - index.need  # what row i may hold alone
    while p < p_end and q < q_end and total < index.need and spare >= 0:
        a, b = index.column[p], index.column[q]
        own = index.mass[p]
        total += min(own, index.mass[q]) * (a == b)
        spare -= own * (a < b)
        p += a <= b
        q += b <= a
    return total >= index.need


@kernel
def measure_nearest(begin, end, index, lists, nearest, hits, count):
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
def settle(begin, end, index, doubtful, min_samples, core):
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
            c, own = index.column[p], index.mass[p]
            for e in range(index.start[c], index.start[c + 1]):
                if index.row[e] != i:
                    met = meet(keys, sums, slots, met, index.row[e], min(own, index.list_mass[e]))

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
def unite(parent, i, j):
    """The smaller root becomes the parent, so a set's root is its smallest member."""
    i, j = _find_root(parent, i), _find_root(parent, j)
    parent[max(i, j)] = min(i, j)


@kernel
def link_nearest(lists, nearest, hits, core, parent):
    for i in range(len(parent)):
        if core[i]:
            for a in range(nearest):
                if hits[i] >> a & 1 and core[lists[i, a]]:
                    unite(parent, i, lists[i, a])


@kernel
def link_pairs(pairs, parent):
    for p in range(0, len(pairs), 2):
        unite(parent, pairs[p], pairs[p + 1])


@kernel
def find_sets(begin, end, parent, core, group):
    for i in range(begin, end):
        root = i
        while parent[root] != root:
            root = parent[root]
        group[i] = root if core[i] else _NOT_CORE


@kernel
def compare_columns(begin, end, index, group, sets):
    """``sets[c]``: the set of all cores in the list of column c, or that they are of several, or that there is none."""
    for c in range(begin, end):
        sets[c] = _NOT_CORE
        for e in range(index.start[c], index.start[c + 1]):
            g = group[index.row[e]]
            if g == _NOT_CORE or g == sets[c]:
                continue
            if sets[c] != _NOT_CORE:
                sets[c] = MIXED
                break
            sets[c] = g


@kernel
def bridge(begin, end, index, group, sets):
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
            c, own = index.column[p], index.mass[p]
            if sets[c] != MIXED:
                continue
            for e in range(index.start[c], index.start[c + 1]):
                j = index.row[e]
                if j >= i:
                    break
                if group[j] != _NOT_CORE and group[j] != group[i]:
                    met = meet(keys, sums, slots, met, j, min(own, index.list_mass[e]))

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
def label_borders(rows, indptr, near, group, labels):
    for r in range(len(rows)):
        if group[rows[r]] != _NOT_CORE:
            continue
        least = -1
        for e in range(indptr[r], indptr[r + 1]):
            if group[near[e]] != _NOT_CORE and (least == -1 or labels[near[e]] < least):
                least = labels[near[e]]
        labels[rows[r]] = least

# SPDX-License-Identifier: Apache-2.0
"""The label step on a CPU, shared out over ranks: the steps of ``pseudo_labels``, each rank with rows of its own.

What is cheap and needed by all (the order of columns, the inverted lists, the sets) each rank makes for itself from
gathered parts; what takes the time is divided. Neighbour lists, encoding, averaging and the first measurements cost
about the same for every row and go by equal numbers of rows. The entries that a doubtful row or a bridge has to walk
differ a hundredfold and can be counted beforehand, so these go by that count. Everything is integers and forests whose
roots are smallest members, so neither the number of ranks nor their order can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ._threads import kernel, over_rows
from .graph_free import (
    MIXED,
    MOST_NEAREST,
    NEAREST,
    bridge,
    compare_columns,
    find_sets,
    label_borders,
    link_nearest,
    link_pairs,
    measure_nearest,
    settle,
    unite,
)
from .jaccard import Index, count_columns, index_sorted, least_overlap, rare_first
from .k_reciprocal import average_rows, averaged_lists, half_length, mutual_neighbours, soft_rows
from .rows import Rows, row_weight, sort_rows


class Exchange(Protocol):
    """How ranks talk. Each calls the same methods in the same order.

    Attributes:
        rank, world: which of how many.
    """

    rank: int
    world: int

    def gather(self, own: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, one after the other in their order, along the first axis, which may differ."""


def equal_share(n: int, ranks: Exchange) -> range:
    """This rank's part of n rows; sizes differ by one at most."""
    return range(n * ranks.rank // ranks.world, n * (ranks.rank + 1) // ranks.world)


def share_of_work(work: np.ndarray, ranks: Exchange) -> range:
    """This rank's run of the rows that cost ``work`` (n,) int64 each: a fair part of the sum, give or take one row."""
    upto = np.cumsum(work + 1)  # a row costs something even if it has nothing to walk
    total = int(upto[-1]) if len(upto) else 0
    ends = [int(np.searchsorted(upto, total * r // ranks.world, side="right")) for r in (ranks.rank, ranks.rank + 1)]
    return range(*ends)


@kernel
def _count_work(begin, end, rows, index, sets, work):
    """Entries that each of ``rows`` meets: of all its columns, or, with ``sets``, of those that are mixed."""
    for r in range(begin, end):
        total = 0
        for e in range(index.indptr[rows[r]], index.stop[rows[r]]):
            c = index.column[e]
            if len(sets) == 0 or sets[c] == MIXED:
                total += index.start[c + 1] - index.start[c]
        work[r] = total


@kernel
def _merge(forest, parent):
    for i in range(len(parent)):
        if forest[i] != i:
            unite(parent, i, forest[i])


def _merged(parent: np.ndarray, ranks: Exchange) -> np.ndarray:
    """One forest that joins whatever any rank's does."""
    for forest in ranks.gather(parent).reshape(ranks.world, len(parent)):
        _merge(forest, parent)
    return parent


def _gathered(own: Rows, ranks: Exchange) -> Rows:
    count = ranks.gather(np.diff(own.indptr))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    return Rows(indptr, ranks.gather(own.column), ranks.gather(own.mass))


def encode_sorted(x: np.ndarray, lists: np.ndarray, k2: int, ranks: Exchange, *, compat: bool, threads: int) -> Rows:
    """All rows in fixed point, columns named rare first and ascending; each rank encodes and sorts its own."""
    own = equal_share(len(lists), ranks)
    mutual = ranks.gather(mutual_neighbours(lists, half_length(lists.shape[1]), threads, own))
    v = soft_rows(x, lists, mutual, k2, compat=compat, fixed=True, threads=threads, rows=own)
    del mutual
    if k2 > 1:
        v = average_rows(_gathered(v, ranks), averaged_lists(x, lists, k2, threads), k2, threads, own)
    count = ranks.gather(count_columns(v, len(lists))).reshape(ranks.world, len(lists)).sum(axis=0)
    sort_rows(v, rare_first(count), threads)
    return _gathered(v, ranks)


def cluster(index: Index, lists: np.ndarray, min_samples: int, ranks: Exchange, threads: int) -> np.ndarray:
    """(N,) int64 labels of the rows of ``index``, the same on every rank; ``lists`` (N, k1) int32 as hints."""
    n, k1 = lists.shape
    nearest = min(k1, max(NEAREST, min(2 * min_samples, MOST_NEAREST - 1)) + 1)
    own = equal_share(n, ranks)
    hits, count = np.zeros(n, np.int64), np.zeros(n, np.int32)
    given = index, lists, nearest, hits, count
    over_rows(measure_nearest, own.stop, threads, *given, most=1024, begin=own.start)
    core = ranks.gather(count[own.start : own.stop] >= min_samples)

    doubtful = np.flatnonzero(~core).astype(np.int32)
    work = np.zeros(len(doubtful), np.int64)
    over_rows(_count_work, len(doubtful), threads, doubtful, index, np.empty(0, np.int32), work)
    part = share_of_work(work, ranks)
    given = index, doubtful, min_samples, core
    settled = over_rows(settle, part.stop, threads, *given, most=1024, begin=part.start)
    core[doubtful] = ranks.gather(core[doubtful[part.start : part.stop]])

    parent, group, sets = np.arange(n, dtype=np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
    link_nearest(lists, nearest, hits, core, parent)  # rows of other ranks have no hits here
    parent = _merged(parent, ranks)
    over_rows(find_sets, n, threads, parent, core, group)
    columns = share_of_work(np.diff(index.start), ranks)
    over_rows(compare_columns, columns.stop, threads, index, group, sets, begin=columns.start)
    sets = ranks.gather(sets[columns.start : columns.stop])

    cores = np.flatnonzero(core).astype(np.int32)
    work = np.zeros(len(cores), np.int64)
    over_rows(_count_work, len(cores), threads, cores, index, sets, work)
    part_of_cores = share_of_work(work, ranks)
    first, last = np.append(cores, n)[[part_of_cores.start, part_of_cores.stop]]
    for pairs in over_rows(bridge, int(last), threads, index, group, sets, most=1024, begin=int(first)):
        link_pairs(pairs, parent)
    parent = _merged(parent, ranks)
    over_rows(find_sets, n, threads, parent, core, group)

    number = np.cumsum(group == np.arange(n)) - 1  # of the cluster that starts at a row
    labels = np.where(core, number[group], -1)
    begin = part.start
    for indptr, near in settled:
        rows = doubtful[begin : begin + len(indptr) - 1]
        begin += len(rows)
        label_borders(rows, indptr, near, group, labels)
    labels[doubtful] = ranks.gather(labels[doubtful[part.start : part.stop]])
    return labels


def pseudo_labels(
    x: np.ndarray,
    lists: np.ndarray,
    k2: int,
    eps: Sequence[float],
    min_samples: int,
    ranks: Exchange,
    *,
    compat: bool = False,
    threads: int = 1,
) -> np.ndarray:
    """(len(eps), N) int64, those of one process alone, the same on every rank.

    Args:
        x, lists, k2, eps, min_samples, compat, threads: as there; the same on every rank, with all N rows.
        ranks: how they talk.

    Memory of a rank: the encoding and its inverted lists whole, 8 bytes an entry each; V of all ranks and 9 k1 bytes
    for each own row while it is made; 4 N for each rank while forests are merged, and about 60 N for the clustering.
    """
    weight = row_weight(k2)
    need = [least_overlap(e, weight) for e in eps]
    rows = encode_sorted(x, lists, k2, ranks, compat=compat, threads=threads)
    index = index_sorted(rows, weight, min(need), threads)
    return np.stack([cluster(index._replace(need=t), lists, min_samples, ranks, threads) for t in need])

# SPDX-License-Identifier: Apache-2.0
"""Sums of Jaccard distances inside clusters on a CPU, pair by pair from the encoding; no pair is stored.

A row is spread out over one array of N integers, and every member of its cluster walks its own entries over that.
Distances are added as integers of 2^-30, so that no sum depends on its order.
"""

from __future__ import annotations

import numpy as np

from ._threads import kernel, over_rows
from .k_reciprocal import Rows, bits, encode

UNIT = 2**30


@kernel
def _distance(indptr, column, mass, held, j, weight):
    """J of the row that is spread out and row j, in units: as float32, which is how a graph stores it."""
    shared = 0
    for e in range(indptr[j], indptr[j + 1]):
        shared += min(held[column[e]], mass[e])
    return np.int64(np.rint(np.float64(np.float32(2 * (weight - shared) / (2 * weight - shared))) * UNIT))


@kernel
def _sum(begin, end, wanted, rows, weight, labels, members, start, tight, tight_members, tight_start, inside, changed):
    indptr, column, mass = rows
    held = np.zeros(len(labels), np.int32)
    for r in range(begin, end):
        i = wanted[r]
        for e in range(indptr[i], indptr[i + 1]):
            held[column[e]] = mass[e]
        for m in range(start[labels[i]], start[labels[i] + 1]):
            j = members[m]
            if j == i:
                continue
            distance = _distance(indptr, column, mass, held, j, weight)
            inside[i] += distance
            if tight[j] != tight[i]:
                changed[i] += distance
        for m in range(tight_start[tight[i]], tight_start[tight[i] + 1]):
            j = tight_members[m]
            if labels[j] != labels[i]:
                changed[i] += _distance(indptr, column, mass, held, j, weight)
        for e in range(indptr[i], indptr[i + 1]):
            held[column[e]] = 0


def _grouped(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of each label, ascending, one label after the other, and where each begins."""
    return np.argsort(labels, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(labels))])


def sums_within(
    x: np.ndarray,
    lists: np.ndarray,
    k2: int,
    labels: np.ndarray,
    tight: np.ndarray,
    wanted: np.ndarray,
    *,
    compat: bool = False,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 each, in units of 2^-30: distances to the rest of the own cluster, and to what ``tight`` changes.

    Args:
        x: (N, D) float32, contiguous, N > 0.
        lists: (N, k1) int32, nearest first.
        k2, compat, threads: as in :func:`encode`.
        labels, tight: (N,) int64, no noise; the second sum is over the points that share exactly one of the two.
        wanted: rows to sum for; the others are 0.

    Work is the number of pairs asked for times the entries of a row; memory the encoding, and 4 N for each thread.
    """
    rows: Rows = encode(x, lists, k2, compat=compat, fixed=True, threads=threads)
    weight = k2 << bits(k2)
    inside, changed = np.zeros(len(x), np.int64), np.zeros(len(x), np.int64)
    groups = (labels, *_grouped(labels), tight, *_grouped(tight))
    over_rows(_sum, len(wanted), threads, wanted, tuple(rows), weight, *groups, inside, changed, most=256)
    return inside, changed

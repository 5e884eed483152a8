# SPDX-License-Identifier: Apache-2.0
"""Scores of ranked lists from counts: of each list only the pairs that its identity names are looked at, on the host.

A query's pairs are the gallery images of its identity and those that are itself. Some of them are junk, which is not in
the list; the others are its matches. A backend counts all gallery rows before each match, and the junk is taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

PAIRS = 2**20  # pairs of a block of queries, unless one query has more


class Distances(Protocol):
    """The distances of all queries to a gallery, behind which a backend stands."""

    def measure(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """(M,) float64: of the queries ``row`` and the gallery rows ``column``, both (M,) int64."""

    def count(self, start: np.ndarray, column: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """(3, M) int64: how many gallery rows are nearer than each mark, come before it in order, are no farther.

        ``start`` (Q + 1,) points into ``column`` and ``distance``, ascending by (distance, column) for each query.
        """

    def subset(self, members: np.ndarray) -> Distances:
        """The same of the gallery rows ``members``, ascending."""


@dataclass(frozen=True)
class Ids:
    """Identities, and optionally cameras and image numbers, of queries and gallery: int64 arrays."""

    q_pids: np.ndarray
    g_pids: np.ndarray
    q_camids: np.ndarray | None = None
    g_camids: np.ndarray | None = None
    q_images: np.ndarray | None = None
    g_images: np.ndarray | None = None

    def junk(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Which pairs are no part of a ranking: one identity and camera, or one image."""
        junk = np.zeros(np.broadcast_shapes(row.shape, column.shape), bool)
        if self.q_camids is not None:
            same = self.q_pids[row] == self.g_pids[column]
            junk |= same & (self.q_camids[row] == self.g_camids[column])
        if self.q_images is not None:
            junk |= self.q_images[row] == self.g_images[column]
        return junk


class Pairs(NamedTuple):
    """Pairs of some queries, ascending by (row, distance, column)."""

    row: np.ndarray
    column: np.ndarray
    junk: np.ndarray
    distance: np.ndarray


class Counted(NamedTuple):
    """Per pair: how many gallery rows are nearer, before it in order, no farther; of junk no matter."""

    less: np.ndarray
    before: np.ndarray
    upto: np.ndarray


class Scored(NamedTuple):
    """Lists that have a match: which groups they are, AP, share of the last match's rank, rank of the first match."""

    group: np.ndarray
    ap: np.ndarray
    inp: np.ndarray
    first: np.ndarray


def blocks_of_pairs(ids: Ids, distances: Distances) -> Iterator[Pairs]:
    """The measured pairs of all queries that have any, a block of queries after the other."""
    by_pid = _Equal(ids.q_pids, ids.g_pids)
    by_image = None if ids.q_images is None else _Equal(ids.q_images, ids.g_images)
    total = np.cumsum(by_pid.count if by_image is None else by_pid.count + by_image.count)
    begin = 0
    while begin < len(total):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + PAIRS, side="right")))
        row, column = by_pid.pairs(begin, end)
        if by_image is not None:  # an image may be itself under another identity
            r, c = by_image.pairs(begin, end)
            other = ids.q_pids[r] != ids.g_pids[c]
            row, column = np.concatenate([row, r[other]]), np.concatenate([column, c[other]])
        if len(row):
            distance = distances.measure(row, column)
            order = np.lexsort((column, distance, row))
            row, column = row[order], column[order]
            yield Pairs(row, column, ids.junk(row, column), distance[order])
        begin = end


class _Equal:
    """For each query the gallery rows of an equal number."""

    def __init__(self, of_query: np.ndarray, of_gallery: np.ndarray) -> None:
        self.order = of_gallery.argsort(kind="stable")
        found = of_gallery[self.order]
        self.first = np.searchsorted(found, of_query)
        self.count = np.searchsorted(found, of_query, side="right") - self.first

    def pairs(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of the queries ``begin .. end - 1``, ascending."""
        count = self.count[begin:end]
        skip = self.first[begin:end] - (count.cumsum() - count)
        place = np.arange(count.sum()) + np.repeat(skip, count)
        return np.repeat(np.arange(begin, end), count), self.order[place]


def counted(pairs: Pairs, distances: Distances, queries: int) -> Counted:
    """What comes before each match, junk included."""
    match = ~pairs.junk
    start = np.concatenate([[0], np.bincount(pairs.row[match], minlength=queries).cumsum()])
    found = np.zeros((3, len(match)), np.int64)
    found[:, match] = distances.count(start, pairs.column[match], pairs.distance[match])
    return Counted(*found)


def scored(group: np.ndarray, pairs: Pairs, counts: Counted, formula: str) -> Scored:
    """Scores of the lists of pairs of equal ``group``, which ascends; pairs of a group ascend by (distance, column)."""
    match = ~pairs.junk
    new = np.append(True, group[1:] != group[:-1])
    head = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))  # where each pair's group begins
    junk_before, hits_before = (
        flags.cumsum() - flags for flags in (pairs.junk.astype(np.int64), match.astype(np.int64))
    )
    junk_before, hits_before = junk_before - junk_before[head], hits_before - hits_before[head]
    rank = counts.before - junk_before + 1
    if formula == "rank":
        precision = (hits_before + 1) / np.maximum(rank, 1)
    else:  # a threshold lets in all equal distances at once
        tied = np.append(True, new[1:] | (pairs.distance[1:] != pairs.distance[:-1]))
        run = tied.cumsum() - 1
        begin = tied.nonzero()[0]
        end = np.append(begin[1:], len(run)) - 1
        nearer = counts.less - junk_before[begin][run]
        upto = counts.upto - (junk_before[end] + pairs.junk[end])[run]
        precision = (hits_before[end] + match[end])[run] / np.maximum(upto, 1)
        if formula == "trapezoid":  # the curve starts at precision 1, recall 0
            last = np.where(nearer > 0, hits_before[begin][run] / np.maximum(nearer, 1), 1.0)
            precision = (precision + last) / 2

    group, precision, rank = group[match], precision[match], rank[match]
    begin = np.append(True, group[1:] != group[:-1])[: len(group)].nonzero()[0]
    matches = np.diff(np.append(begin, len(group)))
    total = np.add.reduceat(precision, begin) if len(begin) else np.empty(0)
    return Scored(group[begin], total / matches, matches / rank[begin + matches - 1], rank[begin])

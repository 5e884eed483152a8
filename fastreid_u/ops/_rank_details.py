# SPDX-License-Identifier: Apache-2.0
"""What ``rank_metrics`` gives when asked: TPR at FPR, scores by camera pair, the first of each ranked list."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastreid_u.ops._ranked_lists import Counted, Distances, Ids, Pairs, scored
from fastreid_u.ops.knn import knn

_PROBES = 256  # distances looked at in a pass
_MARKS = 2**20  # probes times queries at a time
_SAMPLE = 2**16  # pairs from which the first ones are guessed
_LISTED = 2**24  # neighbours searched at a time


@dataclass(frozen=True, eq=False)
class CameraPairs:
    """Scores of query camera a (row) against gallery camera b (column) alone.

    Attributes:
        q_camids, g_camids: (A,) and (B,) int64, ascending: the cameras.
        mAP, top1: (A, B) float64, mean over the queries of camera a that have a match in camera b; NaN without one.
        num_valid_queries: (A, B) int64, how many these are.
    """

    q_camids: Tensor
    g_camids: Tensor
    mAP: Tensor
    top1: Tensor
    num_valid_queries: Tensor


class ByCamera:
    """Counts by gallery camera, whose sum is the count in the whole gallery, and the scores within each."""

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.q_camids, self.q_at = np.unique(ids.q_camids, return_inverse=True)
        self.g_camids, self.g_at = np.unique(ids.g_camids, return_inverse=True)
        self.sums = np.zeros((3, len(self.q_camids) * len(self.g_camids)))

    def count(self, pairs: Pairs, distances: Distances, formula: str) -> Counted:
        """As ``counted``, of the same pairs; keeps the scores by camera."""
        match = ~pairs.junk
        start = np.concatenate([[0], np.bincount(pairs.row[match], minlength=len(self.ids.q_pids)).cumsum()])
        column, distance, at = pairs.column[match], pairs.distance[match], self.g_at[pairs.column]
        whole, own = np.zeros((2, 3, len(match)), np.int64)
        for camera in range(len(self.g_camids)):
            members = np.flatnonzero(self.g_at == camera)
            found = distances.subset(members).count(start, np.searchsorted(members, column), distance)
            whole[:, match] += found
            of_it = at[match] == camera
            own[:, match.nonzero()[0][of_it]] = found[:, of_it]
        group = pairs.row * len(self.g_camids) + at
        order = group.argsort(kind="stable")
        lists = scored(group[order], Pairs(*(x[order] for x in pairs)), Counted(*own[:, order]), formula)
        row, camera = np.divmod(lists.group, len(self.g_camids))
        cell = self.q_at[row] * len(self.g_camids) + camera
        for total, weight in zip(self.sums, (np.ones(len(cell)), lists.ap, lists.first == 1), strict=True):
            total += np.bincount(cell, weight, len(total))
        return Counted(*whole)

    def result(self, device: torch.device) -> tuple[Tensor, ...]:
        """The fields of ``CameraPairs``."""
        queries, ap, first = self.sums.reshape(3, len(self.q_camids), len(self.g_camids))
        with np.errstate(invalid="ignore"):
            found = self.q_camids, self.g_camids, ap / queries, first / queries, queries.astype(np.int64)
        return tuple(torch.from_numpy(x).to(device) for x in found)


class TrueAccepts:
    """The share of matches within the largest distance at which no more than a share of the other pairs is."""

    def __init__(self, ids: Ids, gallery: int) -> None:
        self.ids, self.gallery = ids, gallery
        self.matches: list[np.ndarray] = []
        self.junk: list[np.ndarray] = []
        self.valid = np.zeros(len(ids.q_pids), bool)

    def add(self, pairs: Pairs) -> None:
        self.valid[pairs.row[~pairs.junk]] = True
        listed = self.valid[pairs.row]
        self.matches.append(pairs.distance[~pairs.junk])
        self.junk.append(pairs.distance[pairs.junk & listed])

    def result(self, distances: Distances, fprs: list[float]) -> np.ndarray:
        """(F,) float64; a pass over the gallery for each 256-fold of matches that the guess leaves open."""
        matches, junk = (np.sort(np.concatenate(x or [np.empty(0)])) for x in (self.matches, self.junk))
        if len(matches) == 0:
            return np.full(len(fprs), np.nan)
        others = int(self.valid.sum()) * self.gallery - len(matches) - len(junk)
        allowed = np.array([math.floor(fpr * others) for fpr in fprs])
        points = np.unique(matches)
        # points[:low] are known to be within, points[high:] not to be
        low, high = np.zeros(len(fprs), np.int64), np.full(len(fprs), len(points))
        probes = self._guess(points, distances, fprs)
        while len(probes):
            within = self._others(points[probes], distances, matches, junk)
            for f, most in enumerate(allowed):
                at = np.searchsorted(within, most, side="right")  # how many probes are within
                low[f] = max(low[f], probes[at - 1] + 1) if at else low[f]
                high[f] = min(high[f], probes[at]) if at < len(probes) else high[f]
            open_ones = [(a, b - 1) for a, b in zip(low, high, strict=True) if a < b]
            probes = _between(open_ones, _PROBES // len(fprs) + 2)
        accepted = [np.searchsorted(matches, points[n - 1], side="right") if n else 0 for n in low]
        return np.array(accepted) / len(matches)

    def _others(self, points: np.ndarray, distances: Distances, matches: np.ndarray, junk: np.ndarray) -> np.ndarray:
        """How many pairs that are no match lie within each point, which ascend."""
        within = np.zeros(len(points), np.int64)
        rows, step = self.valid.nonzero()[0], max(1, _MARKS // len(points))
        for begin in range(0, len(rows), step):
            here = np.zeros(len(self.valid), np.int64)
            here[rows[begin : begin + step]] = len(points)
            start = np.concatenate([[0], here.cumsum()])
            marks = np.tile(points, start[-1] // len(points))
            upto = distances.count(start, np.full(start[-1], self.gallery), marks)[2]
            within += upto.reshape(-1, len(points)).sum(axis=0)
        return within - sum(np.searchsorted(x, points, side="right") for x in (matches, junk))

    def _guess(self, points: np.ndarray, distances: Distances, fprs: list[float]) -> np.ndarray:
        """Points around the distances at which a sample of pairs has these shares, four deviations to each side."""
        random, ids = np.random.default_rng(0), self.ids
        row = np.sort(random.choice(self.valid.nonzero()[0], _SAMPLE))
        column = random.integers(0, self.gallery, _SAMPLE)
        other = (ids.q_pids[row] != ids.g_pids[column]) & ~ids.junk(row, column)
        sample = np.sort(distances.measure(row[other], column[other]))
        found = []
        for fpr in fprs:
            middle = fpr * len(sample)
            a, b = (int(middle + sign * (4 * math.sqrt(middle) + 4)) for sign in (-1, 1))
            first = np.searchsorted(points, sample[a]) - 1 if a >= 0 and len(sample) else 0
            last = np.searchsorted(points, sample[b], side="right") if b < len(sample) else len(points) - 1
            found.append(np.clip([first, last], 0, len(points) - 1))
        return _between(found, _PROBES // len(fprs) + 2)


def _between(ranges: list, most: int) -> np.ndarray:
    """At most ``most`` integers of each range, both ends among them; ascending."""
    return np.unique(np.concatenate([[], *(np.linspace(a, b, most) for a, b in ranges)]).astype(np.int64))


def first_listed(
    query: Tensor | None, gallery: Tensor | None, distmat: Tensor | None, ids: Ids, k: int
) -> tuple[Tensor, Tensor]:
    """``(index, distance)`` of the first ``k`` of each ranked list, (Q, k); -1 and infinity past its end."""
    q, g = len(ids.q_pids), len(ids.g_pids)
    features = query if distmat is None else distmat
    index = torch.full((q, k), -1, dtype=torch.int64, device=features.device)
    distance = torch.full((q, k), torch.inf, dtype=features.dtype, device=features.device)
    if 0 in (q, g):
        return index, distance
    if distmat is None:
        largest = max(float(x.abs().max()) if x.numel() else 0.0 for x in (query, gallery))
        power = math.frexp(largest)[1]  # distances that float32 does not hold would tie
        power = power if abs(power) > 40 else 0
        query, gallery = (
            torch.ldexp(x, torch.tensor(-power, device=x.device)) if power else x for x in (query, gallery)
        )
    spare = _junk_counts(ids)
    order = np.argsort(spare, kind="stable")
    begin = 0
    while begin < q:
        more = k + spare[order[begin:]]
        fit = np.arange(1, len(more) + 1) * np.minimum(more, g) <= _LISTED
        rows = order[begin : begin + max(1, int(fit.sum()))]
        begin += len(rows)
        wide = int(min(k + spare[rows].max(), g))
        at = torch.from_numpy(rows).to(features.device)
        near, found = knn(query[at], wide, gallery=gallery) if distmat is None else _smallest(distmat[at], wide)
        if distmat is None and power:
            near = torch.ldexp(near, torch.tensor(2 * power, device=near.device))
        junk = torch.from_numpy(ids.junk(rows[:, None], found.cpu().numpy())).to(features.device)
        listed = junk.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
        gone = junk.gather(1, listed)
        index[at, : listed.shape[1]] = found.gather(1, listed).masked_fill(gone, -1)
        distance[at, : listed.shape[1]] = near.gather(1, listed).masked_fill(gone, torch.inf).to(distance.dtype)
    return index, distance


def _junk_counts(ids: Ids) -> np.ndarray:
    """At least as many gallery images as each query has to leave out."""
    count = np.zeros(len(ids.q_pids), np.int64)
    if ids.q_camids is not None:
        both = [np.stack(x, axis=1) for x in ((ids.q_pids, ids.q_camids), (ids.g_pids, ids.g_camids))]
        _, name = np.unique(np.concatenate(both), axis=0, return_inverse=True)
        name = name.reshape(-1)
        count += np.bincount(name[len(count) :], minlength=name.max() + 1)[name[: len(count)]]
    if ids.q_images is not None:
        found = np.sort(ids.g_images)
        count += np.searchsorted(found, ids.q_images, side="right") - np.searchsorted(found, ids.q_images)
    return count


def _smallest(distmat: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest entries of each row, ascending by (entry, column)."""
    cut = distmat.kthvalue(k, dim=1, keepdim=True).values
    row, column = (distmat <= cut).nonzero(as_tuple=True)
    value = distmat[row, column]
    order = value.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    count = row.bincount(minlength=len(distmat))
    first = (count.cumsum(0) - count)[:, None] + torch.arange(k, device=distmat.device)
    return value[order[first]], column[order[first]]

# SPDX-License-Identifier: Apache-2.0
"""Pairs of rows measured in float64, and the order of neighbours: by (distance in float32, index), as one integer."""

from __future__ import annotations

import numpy as np

from ._threads import kernel, over_rows

FAR = np.int64(np.iinfo(np.int64).max)  # later in the order than any neighbour


@kernel(fastmath={"reassoc", "contract"})  # lets the sum run in SIMD lanes, in an order that is the same for every pair
def sq_dist(x, y, i, j):
    """Squared distance of ``x[i]`` and ``y[j]`` summed in float64: exactly 0 for copies, the same both ways."""
    total = 0.0
    for d in range(x.shape[1]):
        difference = np.float64(x[i, d]) - np.float64(y[j, d])
        total += difference * difference
    return total


@kernel
def ascend(keys):
    """Sort int64 keys in place. The one sort of this folder, because each that numba compiles takes seconds."""
    keys.sort()


@kernel
def sift(heap, value):
    """Replace the root of a max-heap, which is its largest entry, by a smaller value."""
    n, at = len(heap), 0
    while True:
        child = 2 * at + 1
        if child >= n:
            break
        if child + 1 < n and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@kernel
def pack(value, j):
    """(float32, index) as one integer in the order of the pairs."""
    bits = np.int64(np.float32(value).view(np.int32))
    if bits < 0:
        bits ^= 0x7FFFFFFF
    return (bits << 32) | j


@kernel
def unpack(key):
    """The float32 of a packed pair; infinity of ``FAR``."""
    if key == FAR:
        return np.float32(np.inf)
    bits = key >> 32
    if bits < 0:
        bits ^= 0x7FFFFFFF
    return np.int32(bits).view(np.float32)


@kernel
def _rank(begin, end, x, y, alone, candidates, out_dist, out_index, found):
    """The nearest of each row's candidates, in the order of ``knn``; ``found[i]``: how many there were, k at most."""
    k = out_dist.shape[1]
    keys = np.empty(candidates.shape[1], np.int64)
    for i in range(begin, end):
        count = 0
        for c in range(candidates.shape[1]):
            j = candidates[i, c]
            if j < 0 or (alone and j == i):
                continue
            keys[count] = pack(sq_dist(x, y, i, j), j)
            count += 1
        ascend(keys[:count])
        at = 0
        if alone:
            out_dist[i, 0], out_index[i, 0] = 0.0, i
            at = 1
        before = FAR
        for c in range(count):
            if at < k and keys[c] != before:  # an index may name a row twice
                out_dist[i, at], out_index[i, at] = unpack(keys[c]), keys[c] & 0xFFFFFFFF
                at += 1
            before = keys[c]
        found[i] = at


def rank_candidates(
    x: np.ndarray, candidates: np.ndarray, k: int, *, gallery: np.ndarray | None = None, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``k`` nearest of given candidates, measured and ordered as :func:`.knn.knn` does.

    Args:
        x, k, gallery, threads: as there.
        candidates: (N, m) int64 rows of the gallery; below 0 for none. A row itself need not be among its own.

    Returns:
        ``(sq_dist, index, found)``: the first two as there, of which row i holds ``found[i]``, (N,) int64.
    """
    out = np.zeros((len(x), k), np.float32), np.full((len(x), k), -1, np.int64)
    found = np.zeros(len(x), np.int64)
    y = x if gallery is None else gallery
    over_rows(_rank, len(x), threads, x, y, gallery is None, candidates, *out, found, most=1024)
    return *out, found

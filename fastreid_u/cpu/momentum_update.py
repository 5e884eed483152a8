# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place, on a CPU (numba).

Oracle: fastreid_u/reference/momentum_update.py. The plain-torch loop spends its time on the overhead of seven small
torch calls a sample; this is the same arithmetic in one compiled call on one thread. Two passes over a sample are all
the memory traffic: its length, then the blend, which measures the new row as it writes it. The division by that length
is folded into the next blend. Same input, same machine: same bits.
"""

from __future__ import annotations

import numpy as np

from ._threads import kernel

RULES = ("sequential", "hard", "mean", "weighted", "index", "push", "push_sequential")
SEQUENTIAL, HARD, MEAN, WEIGHTED, INDEX, PUSH, PUSH_SEQUENTIAL = range(len(RULES))
FINE, BAD_TARGET, BAD_FEATURE = 0, 1, 2  # what momentum_update_ returns

# Sums may be reordered into vector lanes; nothing else is relaxed, so NaN and infinity are still seen.
_compiled = kernel(fastmath={"reassoc", "contract"})


@_compiled
def _dot(a, b):
    total = a.dtype.type(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@_compiled
def _blend(row, a, x, b):
    """``row = a * row + b * x``; returns its squared length."""
    squares = row.dtype.type(0)
    for d in range(len(row)):
        value = a * row[d] + b * x[d]
        row[d] = value
        squares += value * value
    return squares


@_compiled
def _inverse(squares):
    """1 / length, of a length that is at least 1e-12."""
    kind = type(squares)
    return kind(1) / max(np.sqrt(squares), kind(1e-12))


@_compiled
def _scale(row, factor):
    for d in range(len(row)):
        row[d] *= factor


@_compiled
def _chains(targets):
    """For each sample whether it is the first of its row, and the next one of its row, -1 if there is none."""
    n = len(targets)
    order = np.argsort(targets, kind="mergesort")  # stable: the samples of a row stay in batch order
    first, following = np.empty(n, np.bool_), np.empty(n, np.int64)
    for i in range(n):
        b = order[i]
        first[b] = targets[b] >= 0 and (i == 0 or targets[order[i - 1]] != targets[b])
        following[b] = order[i + 1] if i + 1 < n and targets[order[i + 1]] == targets[b] else -1
    return first, following


@_compiled
def _nearest_others(memory, rows):
    """For each of ``rows`` the most similar other row of the memory, the lowest on ties; -1 if there is no other."""
    best = np.full(len(rows), -np.inf, memory.dtype)
    nearest = np.full(len(rows), -1, np.int64)
    for k in range(len(memory)):  # outside: a row of the memory is fetched once for all
        for p in range(len(rows)):
            if rows[p] != k:
                similarity = _dot(memory[k], memory[rows[p]])
                if similarity > best[p]:
                    best[p], nearest[p] = similarity, k
    return nearest


@_compiled
def _hardest(row, x, inverse, following, b):
    """The sample of the chain from ``b`` that is least similar to ``row``, the first such, and its similarity."""
    lowest, chosen = row.dtype.type(np.inf), b
    while b >= 0:
        similarity = _dot(x[b], row) * inverse[b]
        if similarity < lowest:  # strict: the first sample wins a tie
            lowest, chosen = similarity, b
        b = following[b]
    return chosen, lowest


@_compiled
def _centre(out, row, x, inverse, following, start, weighted, temperature):
    """``out`` = the mean of the chain's samples, or their mean with weights softmax(-similarity / temperature)."""
    kind = row.dtype.type
    top, total = kind(-np.inf), kind(0)
    b = start
    while weighted and b >= 0:
        top = max(top, -_dot(x[b], row) * inverse[b] / temperature)
        b = following[b]
    out[:] = 0
    b = start
    while b >= 0:
        weight = np.exp(-_dot(x[b], row) * inverse[b] / temperature - top) if weighted else kind(1)
        total += weight
        _blend(out, kind(1), x[b], weight * inverse[b])
        b = following[b]
    _scale(out, kind(1) / total)


@_compiled
def _update(
    memory, x, targets, keep, take, rule, normalize, temperature, push, index, labels, sizes, means, trusted
):  # fmt: skip
    kind = memory.dtype.type
    for b in range(len(targets)):
        if targets[b] < -1 or targets[b] >= len(memory):
            return BAD_TARGET
    inverse = np.ones(len(x), memory.dtype)
    suspect = kind(0)
    for b in range(len(x)):
        squares = _dot(x[b], x[b])
        suspect += squares
        if normalize:
            inverse[b] = _inverse(squares)
    if not (trusted or np.isfinite(suspect)):  # ten times as fast as looking at every number
        return BAD_FEATURE

    first, following = _chains(targets)
    starts = np.flatnonzero(first)
    nearest = _nearest_others(memory, targets[starts]) if rule == PUSH else starts
    # Rows that are pushed read each other as they were, so the new ones wait here.
    waiting = np.empty((len(starts) if rule == PUSH else 0, x.shape[1]), memory.dtype)
    spare = np.empty(x.shape[1], memory.dtype)  # a row as it was, or as it will be
    for p in range(len(starts)):
        b = starts[p]
        target = targets[b]
        row = memory[target]
        if len(means) > 0:
            spare[:] = row
        if rule == SEQUENTIAL:
            scale = kind(1)
            while b >= 0:
                scale = _inverse(_blend(row, keep * scale, x[b], take * inverse[b]))
                b = following[b]
            _scale(row, scale)
        elif rule in (MEAN, WEIGHTED):
            _centre(spare, row, x, inverse, following, b, rule == WEIGHTED, temperature)
            _scale(row, _inverse(_blend(row, keep, spare, take)))
        elif rule == INDEX:
            b = index[target]
            if b >= 0:
                _scale(row, _inverse(_blend(row, keep, x[b], take * inverse[b])))
        elif rule == HARD:
            b, _ = _hardest(row, x, inverse, following, b)
            _scale(row, _inverse(_blend(row, keep, x[b], take * inverse[b])))
        else:
            b, similarity = _hardest(row, x, inverse, following, b)
            pull = take * (kind(1) - similarity)
            other = nearest[p] if rule == PUSH else _nearest_others(memory, targets[b : b + 1])[0]
            shove = push * (kind(1) + _dot(row, memory[other])) if other >= 0 else kind(0)
            spare[:] = row
            squares = _blend(spare, kind(1) - pull - shove, x[b], pull * inverse[b])
            if other >= 0:
                squares = _blend(spare, kind(1), memory[other], -shove)
            _scale(spare, _inverse(squares))
            if rule == PUSH:
                waiting[p] = spare
            else:
                row[:] = spare
        if len(means) > 0 and labels[target] >= 0:
            label = labels[target]
            for d in range(len(row)):
                means[label, d] += (row[d] - spare[d]) / sizes[label]
    for p in range(len(waiting)):
        memory[targets[starts[p]]] = waiting[p]
    return FINE


def momentum_update_(
    memory: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    normalize: bool = True,
    weight_temperature: float | None = None,
    push_weight: float = 0.2,
    index: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    cluster_sizes: np.ndarray | None = None,
    cluster_means: np.ndarray | None = None,
    trusted: bool = False,
) -> int:
    """Moves the rows of ``memory`` in place; the rules are those of the reference ("row" is "sequential" here).

    Args:
        memory: (C, D) float32 or float64, C-contiguous, changed; ``cluster_means`` too.
        x: (B, D) of the same dtype, C-contiguous.
        targets: (B,) int64, contiguous.
        trusted: ``x`` is known to be finite; only squares that overflow make a difference.

    Returns FINE, or BAD_TARGET or BAD_FEATURE, and then nothing was changed. ``index``, ``labels`` and sizes are not
    checked here. The first call of a process loads the compiled code from numba's cache; the first ever on a machine
    compiles it, which takes seconds.
    """
    kind = memory.dtype.type
    return _update(
        memory, x, targets, kind(momentum), kind(1 - momentum),
        SEQUENTIAL if rule == "row" else RULES.index(rule), normalize,
        kind(1 if weight_temperature is None else weight_temperature), kind(push_weight),
        _NOBODY if index is None else index,
        _NOBODY if labels is None else labels,
        _NOBODY if cluster_sizes is None else cluster_sizes,
        memory[:0] if cluster_means is None else cluster_means,
        trusted,
    )  # fmt: skip


_NOBODY = np.empty(0, np.int64)

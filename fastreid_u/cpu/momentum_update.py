# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place, on a CPU (numba).

Oracle: fastreid_u/reference/momentum_update.py. The plain-torch loop spends its time on the overhead of seven small
torch calls a sample; this is the same arithmetic in one compiled loop on one thread, three passes over a row a sample,
all of them in cache. Same input, same machine: same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

RULES = {"sequential": 0, "hard": 1, "mean": 2}


def _compiled(function: Callable) -> Callable:
    """Machine code kept on disk where there is a place for it.

    Sums may be reordered into vector lanes; nothing else is relaxed, so NaN and infinity are still seen.
    """
    options = {"fastmath": {"reassoc", "contract"}, "nogil": True}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # neither the package nor a home directory can be written: compile once per process
        return njit(function, **options)


@_compiled
def _dot(a, b):
    total = a.dtype.type(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@_compiled
def _inverse_length(a):
    return a.dtype.type(1) / max(np.sqrt(_dot(a, a)), a.dtype.type(1e-12))


@_compiled
def _blend(row, keep, x, take):
    """``row = l2(keep * row + take * x)``; blending and measuring share one pass."""
    squares = row.dtype.type(0)
    for d in range(len(row)):
        row[d] = keep * row[d] + take * x[d]
        squares += row[d] * row[d]
    scale = row.dtype.type(1) / max(np.sqrt(squares), row.dtype.type(1e-12))
    for d in range(len(row)):
        row[d] *= scale


@_compiled
def _update(memory, x, targets, keep, take, rule):
    kind = memory.dtype.type
    keep, take = kind(keep), kind(take)
    if rule == 0:  # rows do not touch each other, so batch order over all rows is batch order in each
        for b in range(len(targets)):
            if targets[b] >= 0:
                _blend(memory[targets[b]], keep, x[b], take * _inverse_length(x[b]))
        return

    chosen = np.zeros(x.shape[1], memory.dtype)
    done = np.zeros(len(targets), np.bool_)
    for first in range(len(targets)):
        row = targets[first]
        if row < 0 or done[first]:
            continue
        chosen[:] = 0
        lowest = kind(np.inf)
        count = 0
        for b in range(first, len(targets)):
            if targets[b] != row:
                continue
            done[b] = True
            count += 1
            scale = _inverse_length(x[b])
            if rule == 1:
                similarity = _dot(x[b], memory[row]) * scale
                if similarity < lowest:  # strict: the first sample wins a tie
                    lowest = similarity
                    for d in range(len(chosen)):
                        chosen[d] = x[b, d] * scale
            else:
                for d in range(len(chosen)):
                    chosen[d] += x[b, d] * scale
        _blend(memory[row], keep, chosen, take if rule == 1 else take / kind(count))


def momentum_update_(
    memory: np.ndarray, x: np.ndarray, targets: np.ndarray, *, momentum: float = 0.1, rule: str = "sequential"
) -> np.ndarray:
    """``row = l2(momentum * row + (1 - momentum) * l2(x_b))`` in place, for the samples that ``rule`` picks.

    Args:
        memory: (C, D) float32 or float64, C-contiguous, changed.
        x: (B, D) of the same dtype, C-contiguous.
        targets: (B,) int64 in -1 .. C - 1, contiguous. Nothing is checked here.
        rule: "sequential", "hard" or "mean".

    Returns ``memory``. The first call of a process loads the compiled loop from numba's cache; the first ever on a
    machine compiles it, which takes seconds.
    """
    _update(memory, x, targets, momentum, 1 - momentum, RULES[rule])
    return memory

# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place, on a CPU (numba).

Oracle: fastreid_u/reference/momentum_update.py. The plain-torch loop spends its time on the overhead of seven small
torch calls a sample; this is the same arithmetic in one compiled loop on one thread, three passes over a row a sample,
all of them in cache. Same input, same machine: same bits.
"""

from __future__ import annotations

import numpy as np

from ._threads import kernel

# Sums may be reordered into vector lanes; nothing else is relaxed, so NaN and infinity are still seen.
_compiled = kernel(fastmath={"reassoc", "contract"})


@_compiled
def _dot(a, b):
    total = a.dtype.type(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@_compiled
def lengths(x):
    """(B,) Euclidean lengths of the rows of ``x``; not finite where a row is not, or where its squares overflow."""
    found = np.empty(len(x), x.dtype)
    for b in range(len(x)):
        found[b] = np.sqrt(_dot(x[b], x[b]))
    return found


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
def _sequential(memory, x, lengths, targets, keep, take):
    """Rows do not touch each other, so batch order over all of them is batch order in each."""
    smallest = memory.dtype.type(1e-12)
    for b in range(len(targets)):
        if targets[b] >= 0:
            _blend(memory[targets[b]], keep, x[b], take / max(lengths[b], smallest))


@_compiled
def _once(memory, x, lengths, targets, keep, take, hard):
    """One move a row, by its least similar sample or by their mean."""
    kind = memory.dtype.type
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
            scale = kind(1) / max(lengths[b], kind(1e-12))
            if hard:
                similarity = _dot(x[b], memory[row]) * scale
                if similarity < lowest:  # strict: the first sample wins a tie
                    lowest = similarity
                    for d in range(len(chosen)):
                        chosen[d] = x[b, d] * scale
            else:
                for d in range(len(chosen)):
                    chosen[d] += x[b, d] * scale
        _blend(memory[row], keep, chosen, take if hard else take / kind(count))


def momentum_update_(
    memory: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    sample_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """``row = l2(momentum * row + (1 - momentum) * l2(x_b))`` in place, for the samples that ``rule`` picks.

    Args:
        memory: (C, D) float32 or float64, C-contiguous, changed.
        x: (B, D) of the same dtype, C-contiguous.
        targets: (B,) int64 in -1 .. C - 1, contiguous. Nothing is checked here.
        momentum: weight of the old row.
        rule: "sequential", "hard" or "mean".
        sample_lengths: ``lengths(x)``, if the caller has looked at them.

    Returns ``memory``. The first call of a process loads the compiled loop from numba's cache; the first ever on a
    machine compiles it, which takes seconds.
    """
    kind = memory.dtype.type
    keep, take = kind(momentum), kind(1 - momentum)
    sample_lengths = lengths(x) if sample_lengths is None else sample_lengths
    if rule == "sequential":
        _sequential(memory, x, sample_lengths, targets, keep, take)
    else:
        _once(memory, x, sample_lengths, targets, keep, take, rule == "hard")
    return memory

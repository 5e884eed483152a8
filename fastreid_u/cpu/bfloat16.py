# SPDX-License-Identifier: Apache-2.0
"""Rows in bfloat16, for CPUs that multiply it several times faster than float32, and how far their products may be off.

If rounding moves no row by more than the share k of its length, the product of two rounded rows, of lengths a and b,
is off by (2 k + k^2) a b at most, and twice that is no more than (2 k + k^2) (a^2 + b^2). Their sums are in float32 and
add what they add to a product of float32 rows, the rounded ones being within 1 + k of their length. A result that is
itself rounded to bfloat16, 8 significant bits, is off by ``GRAIN`` of itself on top.
"""

from __future__ import annotations

import numpy as np

from ._threads import kernel, over_rows

GRAIN = 2.0**-8 / (1 - 2.0**-8)


@kernel(fastmath={"reassoc", "contract"})  # lets the sum run in SIMD lanes
def sq_length(row):
    total = 0.0
    for d in range(len(row)):
        total += np.float64(row[d]) * np.float64(row[d])
    return total


@kernel
def _shorten(begin, end, rows, bits, short):
    """Rows in bfloat16, and the largest share of its length by which that moves one; ``bits`` are those of ``rows``."""
    most, wide, left = 0.0, np.empty(rows.shape[1], np.uint32), np.empty(rows.shape[1], np.float32)
    widened = wide.view(np.float32)
    for i in range(begin, end):
        for d in range(rows.shape[1]):
            kept = (bits[i, d] + np.uint32(0x7FFF) + ((bits[i, d] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            short[i, d] = kept
        widen(short[i], wide)
        for d in range(rows.shape[1]):
            left[d] = rows[i, d] - widened[d]
        length = sq_length(rows[i])
        if length > 0.0:
            most = max(most, sq_length(left) / length)
    return np.sqrt(most)


@kernel
def widen(short, wide):
    """Numbers in bfloat16, for which uint16 stands, to the bits of the same in float32."""
    for j in range(len(short)):
        wide[j] = np.uint32(short[j]) << np.uint32(16)


def shorten(rows: np.ndarray, out: np.ndarray, threads: int = 1) -> float:
    """Write ``rows`` (N, D) float32, rounded to bfloat16, to ``out``, for which uint16 stands; returns k."""
    moved = over_rows(_shorten, len(rows), threads, rows, rows.view(np.uint32), out, most=128)
    return max(moved, default=0.0) * (1 + 2.0**-20)


def doubt(moved: float, bound: float) -> float:
    """What twice a product, not yet rounded itself, may be off, for each unit of a^2 + b^2; ``bound``: in float32."""
    return 2 * moved + moved**2 + bound * (1 + moved) ** 2

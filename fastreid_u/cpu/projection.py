# SPDX-License-Identifier: Apache-2.0
"""Rows in a few directions, and what the distances of these short rows prove about the distances of the long ones.

Let c be a centred row of length a, Q a matrix with r orthonormal columns, z = Q'c, and q = c - Qz what is left of c, at
right angles to all columns. Then c_i.c_j = z_i.z_j + q_i.q_j, and q_i.q_j lies between -e_i e_j and e_i e_j for any
e >= |q| (Cauchy and Schwarz). With e = |q| = sqrt(a^2 - |z|^2) that is

    |z_i - z_j|^2 + (e_i - e_j)^2  <=  |c_i - c_j|^2  <=  |z_i - z_j|^2 + (e_i + e_j)^2,

and in terms of one product of rows p = [z, e] of r + 1 numbers, s = p_i.p_j:

    a_i^2 + a_j^2 - 2 s  <=  |c_i - c_j|^2  <=  a_i^2 + a_j^2 - 2 s + 4 e_i e_j.

What is computed differs from that in four ways; u is half an ulp of the type of the rows, g(n) = n u / (1 - n u) the
bound of n roundings in any order of summation (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).

1. The directions V are orthonormal but for E = V'V - 1, of norm d at most, measured in float64. Q = V (1 + E)^-1/2
   is orthonormal and spans the same space; |Q'c - V'c| <= ((1 - d)^-1/2 - 1) |V'c| <= d (1 + d) a, d being below 1/4.
2. The product V'c is rounded: pieces of 128 columns are summed first, then the pieces, so that no term takes part in
   more than m = 128 + D / 128 roundings. A component is off by g(m) a |v| at most, and the vector by
   g(m) a sqrt(r (1 + d)). With 1: the computed z lies within h a of Q'c, h = g(m) sqrt(r (1 + d)) + d (1 + d).
3. e has to be no less than |q|, whose square is a^2 - |Q'c|^2 <= a^2 - |z|^2 + 2 h (1 + h) a^2: that is what e is made
   of, rounded up. p is then no longer than (1 + 2 h) a, and 2 z_i.z_j differs from the exact one by h (2 + h)
   (a_i^2 + a_j^2) at most, as 2 a_i a_j <= a_i^2 + a_j^2.
4. The product s is rounded: 2 s is off by g(r + 1) (1 + 2 h)^2 (a_i^2 + a_j^2) at most. Rounding the centred rows and
   adding the terms takes 16 u (a_i^2 + a_j^2), as in :mod:`.knn`.

So both bounds hold for computed numbers after ``doubt (a_i^2 + a_j^2) + least`` is taken off, or added, with

    doubt = h (2 + h) + g(r + 1) (1 + 2 h)^2 + 16 u,

and ``least`` for what underflows, no component of c being above 1. Nothing here depends on where V comes from: bad
directions make the bounds loose, never wrong. The two rows may come from different sets, projected in the same
directions. Of nested levels, the first r of V's columns are directions like any other, with the same d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Product = Callable[[np.ndarray, np.ndarray, np.ndarray], object]

_PIECE = 128  # columns summed at a time
_SAMPLE_ROWS = 2048
_STEPS = 2


class Directions(NamedTuple):
    """Columns that hold most of what rows differ in.

    Attributes:
        v: (D, r) float32 or float64; first the direction in which the sample differs most.
        defect: at least the norm of v'v - 1.
    """

    v: np.ndarray
    defect: float


class Projected(NamedTuple):
    """Rows in some directions: what :func:`level` and :func:`doubt` are made from.

    Attributes:
        z: (N, r), the type of the rows.
        norm: (N,) float64 squared lengths of the rows themselves.
        off: h of the module's text, of all r directions.
        width: D of the rows.
    """

    z: np.ndarray
    norm: np.ndarray
    off: float
    width: int


def strided(rows: np.ndarray, most: int) -> np.ndarray:
    """``most`` or fewer of the rows at equal steps: lists of images are sorted by person, so the first would not do."""
    return rows[:: max(1, -(-len(rows) // most))]


def find_directions(rows: np.ndarray, width: int, product: Product = np.matmul) -> Directions:
    """The ``width`` (or D) leading directions of a sample of centred rows, by subspace iteration from a fixed start.

    Args:
        rows: (N, D) float32 or float64, centred, no component above 1.
        product: ``product(a, b, out)`` writes the matrix product of a and b.

    At most 2,048 rows at equal steps are read, twice each in two steps. Memory: the sample, and 8 D (r + 8) bytes a few
    times. Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithm 4.4.
    """
    sample = strided(rows, _SAMPLE_ROWS)
    d, dtype = sample.shape[1], rows.dtype
    width = min(width, d)
    wide = min(width + 8, d)
    largest = np.abs(sample).max(initial=0)
    sample = sample * dtype.type(2.0 ** -int(np.frexp(largest)[1]))  # an outlier elsewhere may have set the scale
    basis = np.random.default_rng(0).standard_normal((d, wide))
    seen, back = np.empty((len(sample), wide), dtype), np.empty((d, wide), dtype)
    for _ in range(_STEPS):
        product(sample, basis.astype(dtype), seen)
        product(sample.T, seen, back)
        basis = np.linalg.qr(back.astype(np.float64))[0]
    product(sample, basis.astype(dtype), seen)
    turn = np.linalg.eigh(seen.T.astype(np.float64) @ seen)[1][:, ::-1]  # largest first
    v = np.ascontiguousarray(basis @ turn[:, :width], dtype)
    gram = v.T.astype(np.float64) @ v
    gram[np.diag_indices(width)] -= 1
    # Frobenius' norm is no less than the norm; the rest is the rounding of the sums in float64
    return Directions(v, float(np.linalg.norm(gram)) + 2.0**-52 * (d + 2) * width)


def project(rows: np.ndarray, norm: np.ndarray, to: Directions, product: Product = np.matmul) -> Projected:
    """``rows`` (N, D), of squared lengths ``norm`` (N,) float64, in the directions ``to``; N r numbers more."""
    (n, d), r = rows.shape, to.v.shape[1]
    z = np.zeros((n, r), rows.dtype)
    step = max(1, 2**20 // max(1, r))
    part = np.empty((min(step, n), r), rows.dtype)
    for first in range(0, n, step):
        block = rows[first : first + step]
        for piece in range(0, d, _PIECE):
            product(block[:, piece : piece + _PIECE], to.v[piece : piece + _PIECE], part[: len(block)])
            z[first : first + step] += part[: len(block)]
    u = float(np.finfo(rows.dtype).eps) / 2
    off = _roundings(_PIECE + -(-d // _PIECE), u) * (r * (1 + to.defect)) ** 0.5 + to.defect * (1 + to.defect)
    return Projected(z, norm, off, d)


def level(projected: Projected, width: int) -> np.ndarray:
    """(N, width + 1): the first ``width`` directions, and e, which is no less than what they leave of the row."""
    z, norm, off, _ = projected
    out = np.empty((len(z), width + 1), z.dtype)
    out[:, :width] = z[:, :width]
    kept = np.einsum("ij,ij->i", out[:, :width], out[:, :width], dtype=np.float64)
    left = np.maximum(norm * (1 + 2 * off * (1 + off) + 2.0**-30) - kept, 0) + least(projected, width)
    out[:, width] = np.sqrt(left) * (1 + 2.0**-22)
    return out


def doubt(projected: Projected, width: int) -> float:
    """What to take off a lower bound, and add to an upper one, for each unit of a_i^2 + a_j^2."""
    u, off = float(np.finfo(projected.z.dtype).eps) / 2, projected.off
    return off * (2 + off) + _roundings(width + 1, u) * (1 + 2 * off) ** 2 + 16 * u


def least(projected: Projected, width: int) -> float:
    """The same for every pair, however short its rows: what underflow can hide."""
    d = projected.width + 16
    return 16 * d**1.5 * (width + 1) * float(np.finfo(np.float32).tiny)


def shares(
    queries: Projected, rows: Projected, limit: np.ndarray, widths: Sequence[int], product: Product = np.matmul
) -> list[float]:
    """For each of ``widths``: the mean share of ``rows`` whose lower bound is within a query's ``limit`` (Q,).

    Of a few queries and a strided sample of the rows this is what a search through all rows would have to measure.
    """
    found = []
    size = np.add.outer(queries.norm, rows.norm)
    score = np.empty(size.shape, queries.z.dtype)
    for width in widths:
        product(level(queries, width), level(rows, width).T, score)
        lower = (1 - doubt(rows, width)) * size - 2.0 * score - least(rows, width)
        found.append(float((lower <= limit[:, None]).mean()))
    return found


def _roundings(n: int, u: float) -> float:
    return n * u / (1 - n * u)

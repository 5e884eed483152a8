# SPDX-License-Identifier: Apache-2.0
"""Rows moved to the mean and scaled by a power of two, for products in float32: distances stay what they are, to scale.

Centring leaves the order of distances alone and shrinks the rows, and with them the rounding of their products, when
features share a large common part.

With a, b the lengths of two centred rows of width D and s their computed product, the squared distance lies within
(D + 16) u (a^2 + b^2) of a^2 + b^2 - 2 s, u being half an ulp of the product's type: gamma_D for the product in any
order of summation (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1) and the rest for rounding the
centred rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._threads import kernel, over_rows


def rounding(width: int, dtype: type = np.float32) -> tuple[float, float]:
    """How far a distance by a product in ``dtype`` may be off: relative to a^2 + b^2, and by underflow."""
    bound = (width + 16) * float(np.finfo(dtype).eps) / 2
    return bound / (1 - bound), (width + 16) * float(np.finfo(np.float32).tiny)


class Origin(NamedTuple):
    """Where rows are moved to.

    Attributes:
        mean: (D,) float64, of the searched rows.
        scale: the power of two that makes every component at most 1: none overflows nor, if it matters, underflows.
    """

    mean: np.ndarray
    scale: float


class Centred(NamedTuple):
    """Both sets of rows less the mean of the searched ones, scaled by a power of two.

    Attributes:
        x, y: rows; the same array if a set is searched for itself.
        norm_x, norm_y: their squared lengths in float64.
        scale: that power of two.
    """

    x: np.ndarray
    y: np.ndarray
    norm_x: np.ndarray
    norm_y: np.ndarray
    scale: float


@kernel
def _extent(begin, end, x):
    """Of some rows, by columns: sum, least, largest."""
    d = x.shape[1]
    out = np.empty((3, d))
    out[0], out[1], out[2] = 0.0, np.inf, -np.inf
    for i in range(begin, end):
        for c in range(d):
            v = np.float64(x[i, c])
            out[0, c] += v
            out[1, c] = v if v < out[1, c] else out[1, c]
            out[2, c] = v if v > out[2, c] else out[2, c]
    return out


@kernel(fastmath={"reassoc", "contract"})
def _centre(begin, end, x, first, mean, scale, out, norm):
    for i in range(begin, end):
        for c in range(x.shape[1]):
            out[i, c] = (np.float64(x[first + i, c]) - mean[c]) * scale
        total = 0.0
        for c in range(x.shape[1]):
            total += np.float64(out[i, c]) * np.float64(out[i, c])
        norm[i] = total


def find_origin(x: np.ndarray, gallery: np.ndarray | None, threads: int = 1) -> Origin:
    """The mean of the searched rows, and the scale of both sets."""
    y = x if gallery is None else gallery
    extents = [np.stack(over_rows(_extent, len(rows), threads, rows, most=512)) for rows in (y, x)[: 1 + (y is not x)]]
    mean = extents[0][:, 0].sum(axis=0) / len(y)
    largest = max(np.abs(part[:, 1:] - mean).max(initial=0) for part in extents)
    return Origin(mean, 2.0 ** -int(np.frexp(largest)[1]))


def move(x: np.ndarray, first: int, origin: Origin, out: np.ndarray, norm: np.ndarray, threads: int = 1) -> None:
    """Write the centred rows ``first ..`` of ``x``, as many as ``out`` has, and their squared lengths in float64."""
    over_rows(_centre, len(out), threads, x, first, *origin, out, norm, most=256)


def moved(x: np.ndarray, origin: Origin, dtype: type, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """All rows of ``x`` centred, in ``dtype``, and their squared lengths in float64."""
    out, norm = np.empty(x.shape, dtype), np.empty(len(x))
    move(x, 0, origin, out, norm, threads)
    return out, norm


def centre(
    x: np.ndarray,
    gallery: np.ndarray | None,
    dtype: type = np.float32,
    threads: int = 1,
    origin: Origin | None = None,
) -> Centred:
    """Both sets whole, moved to ``origin`` (by default their own) and scaled, in ``dtype``."""
    origin = find_origin(x, gallery, threads) if origin is None else origin
    rows_x, norm_x = moved(x, origin, dtype, threads)
    rows_y, norm_y = (rows_x, norm_x) if gallery is None else moved(gallery, origin, dtype, threads)
    return Centred(rows_x, rows_y, norm_x, norm_y, origin.scale)

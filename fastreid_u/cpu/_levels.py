# SPDX-License-Identifier: Apache-2.0
"""Products of matrices that bound the distances of two sets of rows, the cheap ones first.

With n the squared lengths of two centred rows and s their computed product, their squared distance is at least

    n_i + n_j - 2 s - slack,   slack = doubt (n_i + n_j) + least + 2 grain |s|,

and at most n_i + n_j - 2 s + slack + 4 e_i e_j, where a level is

* full: rows as they are, ``doubt`` as in :mod:`.knn`, and ``grain`` and e are 0;
* in a few directions: :mod:`.projection`, which gives e;
* in bfloat16: if rounding moves no row by more than the share k of its length, the product of rounded rows is off by
  (2 k + k^2) a_i a_j at most, twice which is no more than (2 k + k^2) (n_i + n_j); sums in float32 add what they add
  above, the rounded rows being within 1 + k of their length. The result, rounded to 8 bits, is off by ``grain`` =
  2^-8 / (1 - 2^-8) of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import projection
from ._threads import kernel, over_rows
from .knn import rounding

_DIRECTIONS = 64
_LEFT = 0.15  # share of the squared length outside the directions up to which they pay
_NARROW = 256  # columns below which a full product is as cheap


class Side(NamedTuple):
    """One set's rows at a level.

    Attributes:
        rows: what the level's product takes.
        rest: (N,) float64, e.
        moved: the largest share of its length by which rounding has moved a row.
    """

    rows: Any
    rest: np.ndarray
    moved: float = 0.0


class Level(NamedTuple):
    """A product, its bounds (``doubt`` takes the two sides), and what it writes: uint16 stands for bfloat16."""

    side: Callable[[np.ndarray, np.ndarray], Side]
    product: Callable[[Any, Any, np.ndarray], object]
    doubt: Callable[[Side, Side], float]
    least: float
    grain: float = 0.0
    scores: np.dtype | None = None  # None: the type of the centred rows


@kernel(fastmath={"reassoc", "contract"})  # lets the sum run in SIMD lanes
def _sq_length(row):
    total = 0.0
    for d in range(len(row)):
        total += np.float64(row[d]) * np.float64(row[d])
    return total


@kernel
def _centre(begin, end, x, picked, mean, scale, rows, norm):
    for i in range(begin, end):
        row = picked[i]
        for d in range(x.shape[1]):
            rows[i, d] = (x[row, d] - mean[d]) * scale
        norm[i] = _sq_length(rows[i])


@kernel
def _shorten(begin, end, rows, bits, short):
    """Rows in bfloat16, and the largest share of its length by which that moves one; ``bits`` are those of ``rows``."""
    most, wide, left = 0.0, np.empty(rows.shape[1], np.uint32), np.empty(rows.shape[1], np.float32)
    widened = wide.view(np.float32)
    for i in range(begin, end):
        for d in range(rows.shape[1]):
            kept = (bits[i, d] + np.uint32(0x7FFF) + ((bits[i, d] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            short[i, d] = kept
            wide[d] = kept << np.uint32(16)
        for d in range(rows.shape[1]):
            left[d] = rows[i, d] - widened[d]
        length = _sq_length(rows[i])
        if length > 0.0:
            most = max(most, _sq_length(left) / length)
    return np.sqrt(most)


class Centring(NamedTuple):
    """Rows less a middle, scaled by a power of two so that no component is above 1; distances change by the scale only.

    Any middle will do; near the data sums are smaller, and with them the doubt.
    """

    middle: np.ndarray
    scale: float
    dtype: type
    threads: int

    @classmethod
    def of(cls, query: np.ndarray, gallery: np.ndarray, dtype: type, threads: int) -> Centring:
        middle = projection.strided(gallery, 2048).mean(axis=0, dtype=np.float64)
        largest = np.abs(middle).max(initial=0) + max(
            max(over_rows(_largest, len(x), threads, x, most=256), default=0.0) for x in (query, gallery)
        )
        return cls(middle, 2.0 ** -int(np.frexp(largest)[1]), dtype, threads)

    def __call__(self, x: np.ndarray, picked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``x[picked]`` centred, in ``dtype``, and its squared lengths in float64."""
        rows, norm = np.empty((len(picked), x.shape[1]), self.dtype), np.empty(len(picked))
        over_rows(_centre, len(picked), self.threads, x, picked, self.middle, self.scale, rows, norm, most=128)
        return rows, norm


def _largest(begin: int, end: int, x: np.ndarray) -> float:
    return max(float(x[begin:end].max(initial=0)), -float(x[begin:end].min(initial=0)))


def levels(
    gallery: np.ndarray, centring: Centring, product: projection.Product, bfloat16: Callable | None = None
) -> list[Level]:
    """What bounds distances to ``gallery``: the full product, and before it what is cheaper and worth a try."""
    width, dtype = gallery.shape[1], centring.dtype
    bound, least = rounding(width, dtype)

    def transposed(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        product(a, b.T, out)

    full = Level(lambda rows, norm: Side(rows, np.zeros(len(rows))), transposed, lambda a, b: bound, least)
    if bfloat16 is not None and dtype == np.float32:
        return [_in_bfloat16(bfloat16, centring.threads, bound, least), full]
    if width < _NARROW:
        return [full]
    sample, norm = centring(gallery, np.arange(len(gallery))[:: max(1, len(gallery) // 2048)])
    to = projection.find_directions(sample, _DIRECTIONS, product)
    kept = projection.project(sample, norm, to, product).z
    if np.square(kept).sum() < (1 - _LEFT) * norm.sum():
        return [full]
    return [_in_directions(to, width, product), full]


def _in_bfloat16(product: Callable, threads: int, bound: float, least: float) -> Level:
    def side(rows: np.ndarray, norm: np.ndarray) -> Side:
        short = np.empty(rows.shape, np.uint16)
        moved = over_rows(_shorten, len(rows), threads, rows, rows.view(np.uint32), short, most=128)
        return Side(short, np.zeros(len(rows)), max(moved) * (1 + 2.0**-20))

    def doubt(a: Side, b: Side) -> float:
        moved = max(a.moved, b.moved)
        return 2 * moved + moved**2 + bound * (1 + moved) ** 2

    return Level(side, product, doubt, 8 * least, 2.0**-8 / (1 - 2.0**-8), np.dtype(np.uint16))


def _in_directions(to: projection.Directions, width: int, product: projection.Product) -> Level:
    # what the bounds depend on beside the rows, taken from none
    empty = projection.project(np.empty((0, width), to.v.dtype), np.empty(0), to, product)

    def side(rows: np.ndarray, norm: np.ndarray) -> Side:
        short = projection.level(projection.project(rows, norm, to, product), to.v.shape[1])
        return Side(short, short[:, -1].astype(np.float64))

    def transposed(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        product(a, b.T, out)

    doubt = projection.doubt(empty, to.v.shape[1])
    return Level(side, transposed, lambda a, b: doubt, projection.least(empty, to.v.shape[1]))

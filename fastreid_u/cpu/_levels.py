# SPDX-License-Identifier: Apache-2.0
"""Products of matrices that bound the distances of two sets of rows, the cheap ones first.

With n the squared lengths of two centred rows and s their computed product, their squared distance is at least

    n_i + n_j - 2 s - slack,   slack = doubt (n_i + n_j) + least + 2 grain |s|,

and at most n_i + n_j - 2 s + slack + 4 e_i e_j, where a level is

* full: rows as they are, ``doubt`` as in :mod:`.centre`, and ``grain`` and e are 0;
* in a few directions: :mod:`.projection`, which gives e;
* in bfloat16: :mod:`.bfloat16`, whose result is rounded too: ``grain``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import bfloat16 as in_bfloat16
from . import projection
from .centre import Origin, moved, rounding

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


def levels(
    gallery: np.ndarray,
    origin: Origin,
    product: projection.Product,
    threads: int,
    dtype: type,
    bfloat16: Callable | None = None,
) -> list[Level]:
    """What bounds distances to ``gallery``: the full product, and before it what is cheaper and worth a try."""
    width = gallery.shape[1]
    bound, least = rounding(width, dtype)

    def transposed(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        product(a, b.T, out)

    full = Level(lambda rows, norm: Side(rows, np.zeros(len(rows))), transposed, lambda a, b: bound, least)
    if bfloat16 is not None and dtype == np.float32:
        return [_in_bfloat16(bfloat16, threads, bound, least), full]
    if width < _NARROW:
        return [full]
    sample, norm = moved(np.ascontiguousarray(projection.strided(gallery, 2048)), origin, dtype, threads)
    to = projection.find_directions(sample, _DIRECTIONS, product)
    kept = projection.project(sample, norm, to, product).z
    if np.square(kept).sum() < (1 - _LEFT) * norm.sum():
        return [full]
    return [_in_directions(to, width, product), full]


def _in_bfloat16(product: Callable, threads: int, bound: float, least: float) -> Level:
    def side(rows: np.ndarray, norm: np.ndarray) -> Side:
        short = np.empty(rows.shape, np.uint16)
        moved = in_bfloat16.shorten(rows, short, threads)
        return Side(short, np.zeros(len(rows)), moved)

    def doubt(a: Side, b: Side) -> float:
        return in_bfloat16.doubt(max(a.moved, b.moved), bound)

    return Level(side, product, doubt, 8 * least, in_bfloat16.GRAIN, np.dtype(np.uint16))


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

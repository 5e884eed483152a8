# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours on a CPU: products of matrices bound every distance, float64 decides.

Whatever the bounds of a product (:mod:`.centre`) cannot rule out of the first k is measured. Where rows differ in few
directions, a product of r + 1 columns in place of D rules out nearly as much (:mod:`.projection`). A sample of the rows
decides by a model of the cost how many columns to multiply, whether the pairs left go through a second, wider level
before they are measured, or whether to multiply whole rows: in bfloat16 (:mod:`.bfloat16`) on a CPU that has it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from . import bfloat16, projection
from ._threads import over_rows
from .centre import Origin, centre, find_origin, move, moved, rounding
from .filter import Level, level_of, nearest, without_rows
from .measure import rank_candidates as rank_candidates
from .projection import Directions, Product, Projected

_BLOCK_SCORES = 2**23  # of float32: 32 MB
_WIDTHS = (31, 63, 127)  # with e, products of 32, 64, 128 columns
_LEAST_ROWS, _LEAST_WIDTH = 2048, 64  # below, a search takes no longer than a sample
_QUERIES, _SAMPLE = 128, 1024
_TINY = 2.0**60  # rows whose components are all below 2^-30 are compared after scaling
# in multiply-adds of a product, measured on a CPU with AVX-512: gathered and summed one by one, they take longer
_MEASURE, _BOUND, _PAIR = 14, 8, 2000
_BFLOAT16, _DOUBTED = 0.2, 1.5  # time of a product in bfloat16, and the pairs that it leaves, in those of float32


class Found(NamedTuple):
    """Neighbours, and what finding them took.

    Attributes:
        sq_dist, index: (N, k) float32 and int64.
        multiply_adds: of products, of short rows and of measuring.
    """

    sq_dist: np.ndarray
    index: np.ndarray
    multiply_adds: int


class Plan(NamedTuple):
    """What is multiplied: one or two ascending numbers of directions; none for whole rows.

    Attributes:
        widths, to: those numbers, and the directions.
        multiply_adds: spent on finding out.
    """

    widths: tuple[int, ...]
    to: Directions | None
    multiply_adds: int


def make_plan(
    x: np.ndarray,
    gallery: np.ndarray | None,
    k: int,
    origin: Origin,
    product: Product,
    dtype: type,
    in_bfloat16: bool = False,
) -> Plan:
    """Widths by a model of the cost, from the candidates that they leave in a strided sample of rows.

    A query's limit is estimated in the sample too: as many of its rows are nearer, in proportion, as k are of all. The
    sample takes a few hundredths of a search by whole rows; searches that are too short for that are not sampled.
    ``in_bfloat16``: whole rows would be multiplied in that type.
    """
    y = x if gallery is None else gallery
    (n, d), m = x.shape, len(y)
    if min(n, m) < _LEAST_ROWS or d < _LEAST_WIDTH:
        return Plan((), None, 0)
    rows = projection.strided(y, min(_SAMPLE, m // 8))
    queries = projection.strided(x, _QUERIES)
    (rows, norm), (queries, norm_queries) = (
        moved(np.ascontiguousarray(part), origin, dtype) for part in (rows, queries)
    )

    widths = [w for w in _WIDTHS if w <= min(d // 2, len(rows) // 2)]
    to = projection.find_directions(rows, widths[-1], product)
    scores = np.empty((len(queries), len(rows)), dtype)
    product(queries, rows.T, scores)
    sq_dist = np.add.outer(norm_queries, norm) - 2.0 * scores
    rank = min(len(rows), max(2, -(-k * len(rows) // m)))
    limit = np.partition(sq_dist, rank - 1, axis=1)[:, rank - 1]
    short = [projection.project(*pair, to, product) for pair in ((queries, norm_queries), (rows, norm))]
    share = projection.shares(*short, limit, widths, product)
    candidates = dict(zip(widths, (max(k, m * part) for part in share), strict=True))

    wide = to.v.shape[1]
    spent = (5 * (wide + 8) + wide) * rows.size + (len(rows) + wide) * queries.size + scores.size * sum(widths)
    project = d * (n if gallery is None else n + m)

    def cost(plan: tuple[int, ...]) -> float:
        if not plan:
            return n * (m * _BFLOAT16 + k * _DOUBTED * _MEASURE if in_bfloat16 else m + k * _MEASURE) * d
        left = candidates[plan[-1]]
        total = n * m * (plan[0] + 1) + project * plan[-1] + n * left * (d * _MEASURE + _PAIR)
        return total if len(plan) == 1 else total + n * candidates[plan[0]] * (plan[1] * _BOUND + _PAIR)

    plans = [(), *((w,) for w in widths), *itertools.combinations(widths, 2)]
    best = min(plans, key=cost)
    if not best or cost(best) > 0.9 * cost(()):
        return Plan((), None, spent)
    return Plan(best, Directions(np.ascontiguousarray(to.v[:, : best[-1]]), to.defect), spent)


def _projected(x: np.ndarray, origin: Origin, to: Directions, product: Product, threads: int) -> Projected:
    """Rows centred and projected a block at a time, so that they are never copied whole."""
    (n, d), width = x.shape, to.v.shape[1]
    z, norm = np.empty((n, width), to.v.dtype), np.empty(n)
    step = max(64, 2**21 // d)
    rows = np.empty((min(step, n), d), to.v.dtype)
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        block = rows[: part.stop - first]
        move(x, first, origin, block, norm[part], threads)
        found = projection.project(block, norm[part], to, product)
        z[part] = found.z
    return Projected(z, norm, found.off, d)


def _shortened(x: np.ndarray, origin: Origin, threads: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows centred and rounded to bfloat16 a block at a time, their squared lengths before, and how far they moved."""
    short, norm, most = np.empty(x.shape, np.uint16), np.empty(len(x)), 0.0
    step = max(64, 2**21 // x.shape[1])
    rows = np.empty((min(step, len(x)), x.shape[1]), np.float32)
    for first in range(0, len(x), step):
        part = slice(first, min(first + step, len(x)))
        block = rows[: part.stop - first]
        move(x, first, origin, block, norm[part], threads)
        most = max(most, bfloat16.shorten(block, short[part], threads))
    return short, norm, most


class _Rows(NamedTuple):
    """The rows of a search, and how they become levels."""

    x: np.ndarray
    gallery: np.ndarray | None
    origin: Origin
    threads: int

    def whole(self, dtype: type) -> Level:
        rows = centre(self.x, self.gallery, dtype, self.threads, self.origin)
        return level_of(rows.x, rows.y, rows.norm_x, rows.norm_y, *rounding(self.x.shape[1], dtype))

    def in_bfloat16(self) -> Level:
        x, norm_x, of_x = a = _shortened(self.x, self.origin, self.threads)
        y, norm_y, of_y = a if self.gallery is None else _shortened(self.gallery, self.origin, self.threads)
        bound, least = rounding(self.x.shape[1])
        doubt = bfloat16.doubt(max(of_x, of_y), bound)
        return level_of(x, y, norm_x, norm_y, doubt, 8 * least, bfloat16.GRAIN)

    def in_directions(self, plan: Plan, product: Product) -> list[Level]:
        a = _projected(self.x, self.origin, plan.to, product, self.threads)
        b = a if self.gallery is None else _projected(self.gallery, self.origin, plan.to, product, self.threads)
        made = []
        for width in plan.widths:
            short_x = projection.level(a, width)
            short_y = short_x if self.gallery is None else projection.level(b, width)
            bound = projection.doubt(b, width), projection.least(b, width)
            made.append(level_of(short_x, short_y, a.norm, b.norm, *bound))
        return made


def knn(
    x: np.ndarray,
    k: int,
    *,
    gallery: np.ndarray | None = None,
    hint: np.ndarray | None = None,
    threads: int = 1,
    product: Product = np.matmul,
    dtype: type = np.float32,
    in_bfloat16: Product | None = None,
) -> Found:
    """The ``k`` nearest rows of ``gallery``, or of ``x`` itself, for every row of ``x``.

    Args:
        x: (N, D) float32, finite, contiguous.
        k: at most the number of rows searched.
        gallery: (M, D) as ``x``.
        hint: (N, h) int64, rows of the gallery that may be near; negative for none. They are measured first and tighten
            the limit; what they are does not change the result.
        threads: that select; ``product`` has its own.
        product: ``product(a, b, out)`` writes the matrix product of a (B, D) and b (D, M).
        dtype: in which ``product`` really computes, float32 or float64; the bound on its error depends on it.
        in_bfloat16: ``in_bfloat16(a, b, out)`` writes the product of a and b transposed, all three in bfloat16, for
            which uint16 stands; None where that is no faster than ``product``.

    Returns:
        ``(sq_dist, index)`` and the work, (N, k) float32 and int64: the row itself if there is no gallery, then
        ascending by (distance, index). Distances are summed in float64 and rounded once.

    Memory beside the result: 32 MB of scores (or 64 rows of them, if that is more), and either r numbers a row three
    times (r at most 127, and no more than D / 2) or a centred copy of the rows.
    """
    alone = gallery is None
    y = x if alone else gallery
    out = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int64)
    if len(x) == 0 or k == 0:
        return Found(*out, 0)

    origin = find_origin(x, gallery, threads)
    in_bfloat16 = in_bfloat16 if dtype == np.float32 and x.shape[1] > 0 else None
    plan = make_plan(x, gallery, k, origin, product, dtype, in_bfloat16 is not None)
    rows = _Rows(x, gallery, origin, threads)
    if plan.to is not None:
        levels = rows.in_directions(plan, product)
    else:
        levels = [rows.whole(dtype) if in_bfloat16 is None else rows.in_bfloat16()]
    coarse, fine = levels[0], levels[1] if len(levels) == 2 else without_rows(levels[0])
    hint = np.empty((len(x), 0), np.int64) if hint is None else hint
    step = max(64, _BLOCK_SCORES // len(y))
    block_shape, none = (min(step, len(x)), len(y)), (0, len(y))
    is_short = coarse.x.dtype == np.uint16
    scores, short = (
        np.empty(none if is_short else block_shape, dtype),
        np.empty(block_shape if is_short else none, np.uint16),
    )
    scale_sq = origin.scale**2
    factor = scale_sq if scale_sq > _TINY else 1.0
    bounded = measured = 0
    for first in range(0, len(x), step):
        block = coarse.x[first : first + step]
        if is_short:
            in_bfloat16(block, coarse.y, short[: len(block)])
        else:
            product(block, coarse.y.T, scores[: len(block)])
        given = (first, x, y, alone, scores, short, without_rows(coarse), fine, scale_sq / factor, factor, hint, *out)
        for counts in over_rows(nearest, len(block), threads, *given, most=64):
            bounded, measured = bounded + counts[0], measured + counts[1]
    work = plan.multiply_adds + len(x) * len(y) * coarse.x.shape[1] + measured * x.shape[1] + bounded * fine.x.shape[1]
    if plan.to is not None:
        work += (len(x) if alone else len(x) + len(y)) * plan.to.v.size
    return Found(*out, int(work))

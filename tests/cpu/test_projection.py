# SPDX-License-Identifier: Apache-2.0
"""Distances of short rows bound those of long ones, in exact arithmetic, whatever the data and the directions."""

from fractions import Fraction

import numpy as np
import pytest

from fastreid_u.cpu.knn import centre
from fastreid_u.cpu.projection import Directions, doubt, find_directions, least, level, project, shares

KINDS = ["low rank", "noise", "copies", "zeros", "all sizes", "one outlier", "near copies", "tiny"]


def rows_of(kind, n=14, d=37, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    if kind == "low rank":
        x = rng.standard_normal((n, 4)) @ rng.standard_normal((4, d))
    elif kind == "copies":
        x = x[rng.integers(3, size=n)]
    elif kind == "zeros":
        x[:] = 0
    elif kind == "all sizes":
        x *= 10.0 ** np.linspace(-18, 18, n)[:, None]
    elif kind == "one outlier":
        x[3] *= 1e12
    elif kind == "near copies":
        x = x[:1] + 1e-6 * x
    elif kind == "tiny":
        x *= 1e-30
    return np.ascontiguousarray(x, np.float32)


def exact_sq_dist(x, y):
    """(len(x), len(y)) fractions."""
    fractions = [[[Fraction(float(v)) for v in row] for row in rows] for rows in (x, y)]
    return [[sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for b in fractions[1]] for a in fractions[0]]


def assert_bounds_hold(x, y, rows, to, width):
    """Of every pair of original rows: between the lower and the upper bound of a product in short rows."""
    a, b = project(rows.x, rows.norm_x, to), project(rows.y, rows.norm_y, to)
    p, q = level(a, width), level(b, width)
    score = (p @ q.T).astype(np.float64)
    size = np.add.outer(a.norm, b.norm)
    slack = doubt(b, width) * size + least(b, width)
    lower = size - 2 * score - slack
    upper = size - 2 * score + 4.0 * np.multiply.outer(p[:, -1].astype(np.float64), q[:, -1]) + slack
    exact = exact_sq_dist(x, y)
    scale = Fraction(rows.scale) ** 2
    for i in range(len(x)):
        for j in range(len(y)):
            assert Fraction(float(lower[i, j])) <= exact[i][j] * scale <= Fraction(float(upper[i, j]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_in_exact_arithmetic(kind, dtype):
    x, y = rows_of(kind), rows_of(kind, n=11, seed=1)
    rows = centre(x, y, dtype)
    to = find_directions(rows.y, 9)
    for width in (1, 5, 9):
        assert_bounds_hold(x, y, rows, to, width)


def test_bounds_hold_in_bad_directions():
    """Neither orthonormal to more than the stated defect, nor of any use."""
    x = rows_of("noise")
    rows = centre(x, None)
    v = np.linalg.qr(np.random.default_rng(5).standard_normal((37, 6)))[0]
    v = (v * np.linspace(1.02, 0.98, 6)).astype(np.float32)
    gram = v.T.astype(np.float64) @ v - np.eye(6)
    assert_bounds_hold(x, x, rows, Directions(v, float(np.linalg.norm(gram, 2)) * 1.0001), 6)


def test_directions_are_orthonormal_and_the_defect_is_no_less_than_measured():
    rows = centre(rows_of("noise", n=300, d=60), None)
    to = find_directions(rows.x, 20)
    gram = to.v.T.astype(np.float64) @ to.v - np.eye(20)
    assert np.linalg.norm(gram, 2) <= to.defect < 1e-5


def test_directions_find_what_rows_differ_in():
    x = rows_of("low rank", n=200, d=50)
    rows = centre(x, None)
    projected = project(rows.x, rows.norm_x, find_directions(rows.x, 8))
    left = level(projected, 4)[:, -1]
    assert (left**2 < 1e-3 * projected.norm).all(), "four directions hold rows of rank four"
    energy = (projected.z.astype(np.float64) ** 2).sum(axis=0)
    assert (np.diff(energy) <= 1e-6 * energy[0]).all(), "the first direction holds most"


def test_same_directions_every_time():
    rows = centre(rows_of("noise", n=100), None)
    assert np.array_equal(find_directions(rows.x, 5).v, find_directions(rows.x, 5).v)


def test_no_more_directions_than_columns_and_few_rows():
    assert find_directions(centre(rows_of("noise", n=3, d=5), None).x, 40).v.shape == (5, 5)
    assert find_directions(np.zeros((1, 7), np.float32), 3).defect < 1e-5


def test_shares_fall_with_width_and_count_what_lower_bounds_leave():
    x = np.repeat(rows_of("noise", n=20, d=40), 15, axis=0) + 0.05 * rows_of("noise", n=300, d=40, seed=2)
    rows = centre(x, None)
    projected = project(rows.x, rows.norm_x, find_directions(rows.x, 16))
    exact = ((rows.x.astype(np.float64)[:, None] - rows.x) ** 2).sum(-1)
    limit = np.sort(exact, axis=1)[:, 14]
    found = shares(projected, projected, limit, [1, 4, 16])
    assert found[0] > found[1] >= found[2] >= 15 / 300

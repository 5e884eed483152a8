# SPDX-License-Identifier: Apache-2.0
"""The search in short rows: the reference's result on whatever data, for less arithmetic; no hint changes it."""

import numpy as np
import pytest
import torch

from fastreid_u.cpu import knn as cpu
from fastreid_u.cpu.projection import Directions, find_directions
from fastreid_u.ops import _cpu_products
from fastreid_u.ops.knn import knn
from fastreid_u.reference.knn import knn as reference

KINDS = [
    "identities", "noise", "copies", "near copies", "all equal", "one outlier", "common mean", "descending", "low rank",
    "tiny", "huge", "zero variance but one",
]  # fmt: skip


def data(kind, n=220, d=48, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n, d))
    x = rng.standard_normal((n // 11, 6))[rng.integers(n // 11, size=n)] @ rng.standard_normal((6, d)) + 0.2 * noise
    if kind == "noise":
        x = noise
    elif kind == "copies":
        x = x[rng.integers(n // 40, size=n)]
    elif kind == "near copies":
        x = x[rng.integers(n // 40, size=n)] + 1e-6 * noise
    elif kind == "all equal":
        x = np.ones((n, d))
    elif kind == "one outlier":
        x[7] *= 1e9
    elif kind == "common mean":
        x = 1e-3 * x + 50
    elif kind == "descending":
        x = x[np.argsort(-np.linalg.norm(x, axis=1))] * np.linspace(100, 1e-3, n)[:, None]
    elif kind == "low rank":
        x = noise[:, :2] @ rng.standard_normal((2, d))
    elif kind == "tiny":
        x = x * 1e-25
    elif kind == "huge":
        x = x * 1e17
    elif kind == "zero variance but one":
        x = np.ones((n, d))
        x[3, 5] = 2
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))


def assert_same(found, expected):
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.fixture(params=[(5,), (5, 17), (17, 48)], ids=str)
def widths(request, monkeypatch):
    """A plan that the model would not choose on so few rows."""

    def plan(x, gallery, k, origin, product, dtype, in_bfloat16):
        moved = np.empty((len(x), x.shape[1]), dtype)
        cpu.move(x, 0, origin, moved, np.empty(len(x)))
        fit = [w for w in request.param if w <= x.shape[1]]
        return cpu.Plan(tuple(fit), find_directions(moved, fit[-1], product), 0)

    monkeypatch.setattr(cpu, "make_plan", plan)


@pytest.mark.usefixtures("widths")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind):
    x = data(kind)
    for k in (1, 12, 220):
        assert_same(knn(x, k, backend="numba"), reference(x, k))
    y = data(kind, n=150, seed=1)
    for k in (1, 12, 150):
        assert_same(knn(x, k, gallery=y, backend="numba"), reference(x, k, gallery=y))


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_rows_equal_the_reference(kind, in_bfloat16, monkeypatch):
    monkeypatch.setattr(_cpu_products, "has_bfloat16", lambda: in_bfloat16)
    x, y = data(kind), data(kind, n=150, seed=1)
    for k in (1, 12, 220):
        assert_same(knn(x, k, backend="numba"), reference(x, k))
    assert_same(knn(x, 150, gallery=y, backend="numba"), reference(x, 150, gallery=y))


def hints(name, n, own):
    rng = np.random.default_rng(1)
    found = {
        "random": rng.integers(n, size=(n, 9)),
        "all the same": np.full((n, 9), 3),
        "own": np.repeat(np.arange(n)[:, None], 4, axis=1),
        "none": np.full((n, 2), -1),
        "no columns": np.empty((n, 0), np.int64),
        "right": own,
        "right but for some": np.where(rng.random(own.shape) < 0.3, -1, own),
    }[name]
    return torch.from_numpy(np.asarray(found, np.int64))


NAMES = ["random", "all the same", "own", "none", "no columns", "right", "right but for some"]


@pytest.mark.usefixtures("widths")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["identities", "copies", "all equal", "huge"])
def test_no_hint_changes_the_result(kind, name):
    x = data(kind)
    expected = reference(x, 12)
    hint = hints(name, len(x), expected[1].numpy())
    assert_same(knn(x, 12, hint=hint, backend="numba"), expected)
    assert_same(knn(x, 12, gallery=x, hint=hint.int(), backend="numba"), reference(x, 12, gallery=x))
    assert_same(knn(x, 12, hint=hint, backend="reference"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_hint_changes_the_result_of_whole_rows(name):
    x = data("identities")
    expected = reference(x, 12)
    assert_same(knn(x, 12, hint=hints(name, len(x), expected[1].numpy()), backend="numba"), expected)


@pytest.mark.parametrize(
    ("hint", "error", "message"),
    [
        (torch.zeros(9, 1), TypeError, "knn: hint must hold integers, got torch.float32"),
        (torch.zeros(9, dtype=torch.int64), ValueError, r"knn: hint must be 2-D, got shape \(9,\)"),
        (torch.zeros(8, 2, dtype=torch.int64), ValueError, "knn: hint must .*9.*, got"),
        (torch.full((9, 2), 9), ValueError, "knn: hint must .*, got 9"),
        (torch.full((9, 2), -2), ValueError, "knn: hint must .*, got -2"),
    ],
)
def test_rejects_a_hint(hint, error, message):
    with pytest.raises(error, match=message):
        knn(torch.eye(9), 3, hint=hint)


def test_empty_sets_with_a_hint():
    assert knn(torch.zeros(0, 4), 3, hint=torch.zeros(0, 2, dtype=torch.int64))[1].shape[0] == 0


@pytest.fixture
def small_samples(monkeypatch):
    for name, value in {"_LEAST_ROWS": 256, "_WIDTHS": (7, 15, 31), "_QUERIES": 64}.items():
        monkeypatch.setattr(cpu, name, value)


@pytest.mark.usefixtures("small_samples")
def test_a_steep_spectrum_takes_less_arithmetic_and_a_flat_one_no_more_than_the_sample():
    steep, flat = data("identities", 1500, 512).numpy(), data("noise", 1500, 512).numpy()
    whole = 1500 * 1500 * 512
    found = cpu.knn(steep, 10)
    assert found.multiply_adds < whole / 3
    assert_same([torch.from_numpy(part) for part in found[:2]], reference(torch.from_numpy(steep), 10))
    found = cpu.knn(flat, 10)
    assert whole < found.multiply_adds < 1.1 * whole
    assert_same([torch.from_numpy(part) for part in found[:2]], reference(torch.from_numpy(flat), 10))


@pytest.mark.usefixtures("small_samples")
def test_two_sets_of_a_steep_spectrum():
    x, y = data("identities", 600, 512), data("identities", 1500, 512)
    found = cpu.knn(x.numpy(), 10, gallery=y.numpy())
    assert found.multiply_adds < 600 * 1500 * 512 / 2
    assert_same([torch.from_numpy(part) for part in found[:2]], reference(x, 10, gallery=y))


def test_short_searches_are_not_sampled():
    x = data("identities", 300, 64).numpy()
    origin = cpu.find_origin(x, None)
    assert cpu.make_plan(x, None, 5, origin, np.matmul, np.float32) == cpu.Plan((), None, 0)


def test_bad_directions_cost_work_and_change_nothing(monkeypatch):
    x = data("identities")
    v = np.eye(48, 4, dtype=np.float32)
    monkeypatch.setattr(cpu, "make_plan", lambda *_: cpu.Plan((2, 4), Directions(v, 1e-6), 0))
    assert_same(knn(x, 12, backend="numba"), reference(x, 12))


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_and_threads_do_not_matter(monkeypatch, threads):
    x = data("identities")
    expected = reference(x, 9)
    monkeypatch.setattr(cpu, "_BLOCK_SCORES", 64 * 70)
    found = cpu.knn(x.numpy(), 9, threads=threads)
    assert_same([torch.from_numpy(part) for part in found[:2]], expected)

# SPDX-License-Identifier: Apache-2.0
"""Ranks by counting against the oracle, which sorts: ties, copies, junk, all formulas, and what is given when asked."""

import numpy as np
import pytest
import torch

from fastreid_u.cpu import _levels
from fastreid_u.cpu import rank_metrics as cpu
from fastreid_u.cpu.centre import find_origin, moved
from fastreid_u.ops import _cpu_products, _rank_details, _ranked_lists
from fastreid_u.ops.rank_metrics import rank_metrics
from fastreid_u.reference.knn import pair_sq_dist


def same(found, expected):
    for name in ("mAP", "mINP", "num_valid_queries"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12, nan_ok=True), name
    for name in ("cmc", "ap", "inp", "tpr"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), atol=1e-12, rtol=0, equal_nan=True
            )
    assert torch.equal(found.valid, expected.valid)
    if expected.by_camera is not None:
        for name in ("q_camids", "g_camids", "mAP", "top1", "num_valid_queries"):
            pair = (getattr(x.by_camera, name) for x in (found, expected))
            torch.testing.assert_close(*pair, atol=1e-12, rtol=0, equal_nan=True)
    if expected.top_index is not None:
        assert torch.equal(found.top_index, expected.top_index)
        torch.testing.assert_close(found.top_distance, expected.top_distance, atol=0, rtol=3e-7)


def case(seed):
    """Sets of a random kind: spread, clustered, on a coarse grid with many copies, or far from the origin."""
    rng = np.random.default_rng(seed)
    q, g, d = rng.integers(1, 60), rng.integers(1, 300), rng.choice([1, 2, 7, 64, 300])
    kind = rng.integers(4)
    x = rng.standard_normal((q + g, d))
    if kind == 1:
        x = rng.standard_normal((12, d))[rng.integers(0, 12, q + g)] + 0.1 * x
    if kind == 2:
        x = np.round(x[rng.integers(0, 1 + (q + g) // 3, q + g)])
    if kind == 3:
        x = 1000 + x
    ids = [rng.integers(0, rng.integers(1, 12), n) for n in (q, g)]
    cameras = [rng.integers(0, rng.integers(1, 5), n) for n in (q, g)]
    images = [rng.integers(0, q + g, n) for n in (q, g)]
    options = {"ap": ["rank", "sklearn", "trapezoid"][seed % 3], "max_rank": int(rng.integers(1, 60))}
    if rng.integers(2):
        options |= {"q_camids": cameras[0], "g_camids": cameras[1], "by_camera": bool(rng.integers(2))}
    if rng.integers(2):
        options |= {"q_images": images[0], "g_images": images[1]}
    if rng.integers(2):
        options |= {"fpr": [0.0, 0.003, 0.1, 0.5, 1.0], "top": int(rng.integers(1, 30))}
    x = torch.from_numpy(x) if rng.integers(2) else torch.from_numpy(x).float()
    return x[:q], x[q:], ids, options


@pytest.mark.filterwarnings("ignore:rank_metrics. none of")
@pytest.mark.filterwarnings("ignore:rank_metrics. query and gallery are the same")
@pytest.mark.parametrize("seed", range(60))
def test_counts_are_the_oracle_s_ranks(seed, monkeypatch):
    query, gallery, ids, options = case(seed)
    monkeypatch.setattr(cpu, "_CHUNK", 37)
    monkeypatch.setattr(cpu, "_QUERIES", 16)
    monkeypatch.setattr(_ranked_lists, "PAIRS", 500)
    monkeypatch.setattr(_rank_details, "_PROBES", 4)
    monkeypatch.setattr(_rank_details, "_SAMPLE", 64)
    monkeypatch.setattr(_rank_details, "_LISTED", 200)
    monkeypatch.setattr(_levels, "_NARROW", 32)
    monkeypatch.setattr(_levels, "_DIRECTIONS", 8)
    monkeypatch.setattr(_levels, "_LEFT", 2.0)
    monkeypatch.setattr(_cpu_products, "has_bfloat16", lambda: seed % 2 == 0)
    same(
        rank_metrics(query, gallery, *ids, **options, backend="numba"),
        rank_metrics(query, gallery, *ids, **options, backend="reference"),
    )


@pytest.mark.filterwarnings("ignore:rank_metrics. none of")
@pytest.mark.filterwarnings("ignore:rank_metrics. query and gallery are the same")
@pytest.mark.parametrize("seed", range(100, 130))
def test_counts_in_a_matrix_are_the_oracle_s_ranks(seed):
    query, gallery, ids, options = case(seed)
    distmat = -(query @ gallery.T)  # negative distances too
    if seed % 2:
        distmat = distmat.round()
    same(*(rank_metrics(None, None, *ids, distmat=distmat, **options, backend=b) for b in ("numba", "reference")))


@pytest.mark.parametrize("width", [40, 600])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_every_level_bounds_the_measured_distance(width, spread):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(90, 20, generator=generator) @ torch.randn(20, width, generator=generator)
    x = (x + spread * torch.randn(90, width, generator=generator) + 3).numpy()
    query, gallery = x[:30], x[30:]
    origin = find_origin(query, gallery)
    sides = [moved(rows, origin, np.float32) for rows in (query, gallery)]
    assert max(np.abs(rows).max() for rows, _ in sides) <= 1
    row, column = torch.cartesian_prod(torch.arange(30), torch.arange(60)).T
    exact = pair_sq_dist(torch.from_numpy(query), torch.from_numpy(gallery), row, column).numpy().reshape(30, 60)
    exact = exact * origin.scale**2
    size = sides[0][1][:, None] + sides[1][1]
    found = _levels.levels(gallery, origin, _cpu_products.product, 1, np.float32, _cpu_products.in_bfloat16)
    found += _levels.levels(gallery, origin, _cpu_products.product, 1, np.float32)[:-1]
    assert len(found) == (3 if width == 600 else 2)
    for level in found:
        a, b = (level.side(*side) for side in sides)
        scores = np.empty((30, 60), level.scores or np.float32)
        level.product(a.rows, b.rows, scores)
        if level.scores:
            scores = (scores.astype(np.uint32) << 16).view(np.float32)
        scores = scores.astype(np.float64)
        slack = level.doubt(a, b) * size + level.least + 2 * level.grain * np.abs(scores)
        assert (size - 2 * scores - slack <= exact).all()
        assert (exact <= size - 2 * scores + slack + 4 * a.rest[:, None] * b.rest).all()


def test_a_short_level_leaves_little_to_measure(monkeypatch):
    """On rows that lie near few directions, as a network's do, hardly any pair is measured beside the matches."""
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(1500) % 60
    centres = torch.randn(60, 24, generator=generator)
    x = (centres[pids] + 0.1 * torch.randn(1500, 24, generator=generator)) @ torch.randn(24, 512, generator=generator)
    x = (x + 0.05 * torch.randn(1500, 512, generator=generator)).numpy()
    row, column = (x.numpy() for x in (pids[:200, None] == pids[200:]).nonzero(as_tuple=True))
    distance = cpu.measure(x[:200], x[200:], row, column)
    order = np.lexsort((column, distance, row))
    start = np.concatenate([[0], np.bincount(row).cumsum()])
    marks = start, column[order], distance[order]
    opened, place = [], cpu._place
    monkeypatch.setattr(cpu, "_place", lambda *a: (place(*a), opened.append(a[-1][a[0] : a[1]].copy())))
    for bfloat16 in (None, _cpu_products.in_bfloat16):
        opened.clear()
        cpu.count(x[:200], x[200:], *marks, product=_cpu_products.product, bfloat16=bfloat16)
        assert np.concatenate(opened).sum() < 1.5 * len(row)


@pytest.mark.filterwarnings("ignore:rank_metrics")
def test_one_identity_and_rows_that_are_all_equal():
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    for query, gallery in ((x[:20], x[20:]), (x[:1].expand(20, 16), x[:1].expand(380, 16))):
        for pids in ([1] * 380, list(range(380)), [1] + [0] * 379):
            for ap in ("rank", "sklearn", "trapezoid"):
                same(*(rank_metrics(query, gallery, [1] * 20, pids, ap=ap, backend=b) for b in ("numba", "reference")))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_integers_of_any_type_are_ids(dtype):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    pids, camids = np.arange(30) % 5, np.arange(30) % 3
    expected = rank_metrics(x[:9], x[9:], pids[:9], pids[9:], camids[:9], camids[9:])
    found = rank_metrics(x[:9], x[9:], *(a.astype(dtype) for a in (pids[:9], pids[9:], camids[:9], camids[9:])))
    same(found, expected)
    with pytest.raises(TypeError, match=r"rank_metrics: q_pids must hold integers, got torch\.bool"):
        rank_metrics(x[:9], x[9:], pids[:9] > 1, pids[9:])


def test_true_positive_rate_by_hand():
    found = rank_metrics(
        None, None, [1], [1, 0, 1, 0, 1], distmat=torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.4]]), fpr=[0, 0.49, 0.5, 0.99, 1]
    )
    # the tie at 0.3 would let in the second of two others
    assert found.tpr.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3, 1])
    assert rank_metrics(None, None, [1], [1], distmat=torch.ones(1, 1), fpr=0.0).tpr.tolist() == [1.0]  # none to accept


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fpr": 1.5}, ValueError, r"fpr must lie in \[0, 1\], got 1.5"),
        ({"fpr": "low"}, TypeError, "fpr must be a real number or a sequence of them, got 'low'"),
        ({"fpr": []}, ValueError, "fpr must hold at least one number, got an empty sequence"),
        ({"by_camera": True}, ValueError, "q_camids and g_camids must be given with by_camera, got None"),
        ({"by_camera": 1}, TypeError, "by_camera must be True or False, got 1"),
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
    ],
)
def test_rejects(change, error, message):
    with pytest.raises(error, match=f"rank_metrics: {message}"):
        rank_metrics(torch.eye(2), torch.eye(2), [1, 2], [2, 1], **change)


def test_nothing_is_there_that_was_not_asked_for():
    found = rank_metrics(torch.eye(2), torch.eye(2), [1, 2], [2, 1])
    assert [found.tpr, found.by_camera, found.top_index, found.top_distance] == [None] * 4

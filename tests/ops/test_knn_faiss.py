# SPDX-License-Identifier: Apache-2.0
"""faiss as a backend of knn: the same answer as every other when exact; complete, measured and ordered when not."""

import numpy as np
import pytest
import torch

from fastreid_u import _env
from fastreid_u.ops import _faiss as module
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.knn import knn
from fastreid_u.reference import knn as reference

needs_faiss = pytest.mark.skipif(not _env.faiss().present, reason=_env.faiss().detail)


def data(kind, n=300, d=24):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator)
    if kind == "identities":
        x = x[torch.randint(n // 12, (n,), generator=generator)] + 0.3 * x
    elif kind == "grid":
        x = x[:, :3].mul(1.5).round()
    elif kind == "copies":
        x = x[torch.randint(n // 20, (n,), generator=generator)]
    elif kind == "identical":
        x = torch.ones(n, d)
    elif kind == "far from 0":
        x = 1e-3 * x + 7
    elif kind == "two groups":
        x = 1e-4 * x + torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)[:, None]
    elif kind == "tiny":
        x = x * 1e-17
    elif kind == "zero rows":
        x[::3] = 0
    return x


def assert_same(found, expected):
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


KINDS = ["noise", "identities", "grid", "copies", "identical", "far from 0", "two groups", "tiny", "zero rows"]


@needs_faiss
@pytest.mark.parametrize("k", [1, 5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_equals_the_reference(kind, k):
    x = data(kind)
    assert_same(knn(x, k, backend="faiss"), reference.knn(x, k))
    gallery = x[torch.arange(0, 300, 2)]
    assert_same(knn(x[:70], k, gallery=gallery, backend="faiss"), reference.knn(x[:70], k, gallery=gallery))


@needs_faiss
@pytest.mark.parametrize("n", [1, 2, 9, 37, 38, 39])
def test_few_rows(n):
    x = data("noise", n)
    assert_same(knn(x, min(n, 30), backend="faiss"), reference.knn(x, 30))


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_is_not_named_is_beyond_the_limit(kind):
    x = data(kind, 300)
    candidates, limit = module._exact(x.numpy(), None, 9)
    sq_dist = (x.double()[:, None] - x.double()).square().sum(-1).numpy()
    np.put_along_axis(sq_dist, candidates, np.inf, axis=1)
    assert (sq_dist.min(axis=1) >= limit).all()


@needs_faiss
def test_rounding_in_doubt_is_searched_again(monkeypatch):
    from fastreid_u.ops import knn as face

    asked = []

    def search(x, k, gallery):
        asked.append(len(x))
        return reference.knn(x, k, gallery=gallery)

    monkeypatch.setattr(face, "_numba", search)
    knn(data("identities"), 10, backend="faiss")
    assert asked == [], "faiss can tell these apart"
    knn(data("identical"), 10, backend="faiss")
    assert asked == [300], "and these nobody can"


@needs_faiss
@pytest.mark.parametrize("kind", KINDS)
def test_approximate_is_complete_measured_and_in_order(kind):
    x = data(kind, 2000)
    sq_dist, index = knn(x, 20, backend="faiss", approximate=True)
    assert torch.equal(index[:, 0], torch.arange(2000))
    measured = reference.pair_sq_dist(x, x, torch.arange(2000).repeat_interleave(20), index.flatten())
    assert torch.equal(sq_dist.flatten(), measured.float())
    assert index.min() >= 0
    assert all(len(set(row)) == 20 for row in index.tolist())
    later = sq_dist[:, 2:] > sq_dist[:, 1:-1]
    assert (later | ((sq_dist[:, 2:] == sq_dist[:, 1:-1]) & (index[:, 2:] > index[:, 1:-1]))).all()
    if kind == "identities":
        exact = knn(x, 20)[1]
        hits = sum(len(set(a) & set(b)) for a, b in zip(index.tolist(), exact.tolist(), strict=True))
        assert hits / exact.numel() > 0.6


@needs_faiss
@pytest.mark.parametrize("metric", ["l2", "inner product"])
def test_ready_index(metric):
    import faiss

    x = torch.nn.functional.normalize(data("identities"))
    index = faiss.IndexFlatL2(24) if metric == "l2" else faiss.IndexFlatIP(24)
    index.add(x.numpy())
    found = knn(x, 15, backend="faiss", approximate=index)
    assert_same(found, knn(x, 15))
    assert_same(knn(x[:40], 15, gallery=x, backend="faiss", approximate=index), knn(x[:40], 15, gallery=x))
    assert torch.equal(jaccard_graph(x, k1=15, knn=found).values(), jaccard_graph(x, k1=15).values())


class Stub:
    """An index that answers as told."""

    d = 24

    def __init__(self, rows, answer):
        self.ntotal, self.answer = rows, answer

    def search(self, x, k):
        return None, self.answer(len(x), k)


@needs_faiss
def test_rows_that_an_index_leaves_short_are_completed():
    x = data("identities")
    exact = knn(x, 10)
    nothing = Stub(300, lambda n, k: np.full((n, k), -1))
    assert_same(knn(x, 10, backend="faiss", approximate=nothing), exact)
    twice = Stub(300, lambda n, k: np.tile(np.arange(5), (n, 4))[:, :k])
    assert_same(knn(x, 10, backend="faiss", approximate=twice), exact)
    five = Stub(300, lambda n, k: np.tile(np.arange(5), (n, 1)))
    sq_dist, index = knn(x, 3, backend="faiss", approximate=five)
    assert torch.equal(index[:, 0], torch.arange(300))
    assert (index[:, 1:] < 5).all(), "it says so, and it is approximate"
    assert (sq_dist[:, 2] >= sq_dist[:, 1]).all()


@needs_faiss
@pytest.mark.parametrize(
    ("approximate", "error", "message"),
    [
        ("IVF", TypeError, "knn: approximate must be a bool or a faiss index, got str"),
        (Stub(299, None), ValueError, "must index the 300 rows of width 24 that are searched, in their order, got 299"),
        (Stub(300, lambda n, k: np.full((n, k), 300)), ValueError, "must number rows from 0, got row 300 of 300"),
    ],
)
def test_rejects_an_index(approximate, error, message):
    with pytest.raises(error, match=message):
        knn(data("noise"), 5, backend="faiss", approximate=approximate)


def test_approximate_is_faiss_alone():
    with pytest.raises(ValueError, match="knn: approximate must be asked of backend 'faiss', got backend 'numba'"):
        knn(torch.eye(9), 3, backend="numba", approximate=True)
    with pytest.raises(ValueError, match="knn: approximate must be asked of backend 'faiss', got backend 'auto'"):
        knn(torch.eye(9), 3, approximate=True)


def test_missing_faiss_is_named(monkeypatch):
    monkeypatch.setattr(_env, "faiss", lambda: _env.Capability("faiss", False, "pip install 'fastreid-u[faiss]'"))
    with pytest.raises(RuntimeError, match=r"knn: backend must be able to run here, got 'faiss': pip install"):
        knn(torch.eye(9), 3, backend="faiss")
    assert knn(torch.eye(9), 3)[1].shape == (9, 3), "nobody else needs it"


@needs_faiss
@pytest.mark.parametrize(
    ("x", "k", "error", "message"),
    [
        (torch.full((9, 3), torch.nan), 3, ValueError, "knn: x must be finite"),
        (torch.eye(9), 0, ValueError, "knn: k must be at least 1, got 0"),
        (torch.eye(9).long(), 3, TypeError, "knn: x must be floating point"),
    ],
)
def test_rejects(x, k, error, message):
    with pytest.raises(error, match=message):
        knn(x, k, backend="faiss")


@needs_faiss
def test_empty():
    sq_dist, index = knn(torch.zeros(0, 3), 4, backend="faiss")
    assert sq_dist.shape == index.shape == (0, 0)

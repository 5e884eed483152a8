# SPDX-License-Identifier: Apache-2.0
"""Re-ranking as a GPU runs it, interpreted: on a CPU the backend is refused, so its function is called directly."""

import functools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="there is no triton for this platform")

from fastreid_u.cpu import rerank as cpu
from fastreid_u.cpu import rows as cpu_rows
from fastreid_u.kernels import k_reciprocal
from fastreid_u.kernels import rerank as kernel
from fastreid_u.ops import rerank as op
from fastreid_u.ops._scaled_distance import FromFeatures
from fastreid_u.reference import knn as reference_knn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_triton(monkeypatch):
    """``rerank`` with the functions that it has on a GPU, but a search that does not have to be interpreted."""
    if DEVICE == "cpu":
        monkeypatch.setattr(op, "nearest_neighbours", lambda x, k, backend: reference_knn.knn(x, k))

    def run(query, gallery, k1, k2, weight, *, distance="sqeuclidean", distmats=None, top=None, style="openreid"):
        move = functools.partial(torch.Tensor.to, device=DEVICE)
        query, gallery = (None if rows is None else move(rows) for rows in (query, gallery))
        distmats = distmats and tuple(map(move, distmats))
        given = dict(style=style, distance=distance, distmats=distmats, top=top)
        found = op._triton(query, gallery, k1, k2, weight, **given)
        return found.cpu() if top is None else tuple(part.cpu() for part in found)

    return run


def test_golden(golden, on_triton):
    file = golden("rerank_q20_g90_sqeuclidean")
    distmats = tuple(file.tensor(name) for name in ("q_g", "q_q", "g_g"))
    found = on_triton(None, None, 10, 3, 0.3, distmats=distmats)
    torch.testing.assert_close(found, file.tensor("final_k10_3_l0.3"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equals_the_cpu(clustered, on_triton, distance):
    x = clustered(30, 7) * torch.linspace(0.6, 1.3, 30)[:, None]
    x[[4, 20]] = 0
    x[27:] = x[3]
    found = on_triton(x[:10], x[10:], 8, 12, 0.4, distance=distance)  # more rows averaged than lists hold
    expected = op.rerank(x[:10], x[10:], 8, 12, 0.4, distance=distance, backend="numba")
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    nearest = on_triton(x[:10], x[10:], 8, 3, 0.4, distance=distance, top=4)
    expected = op.rerank(x[:10], x[10:], 8, 3, 0.4, distance=distance, backend="numba", top=4)
    assert torch.equal(nearest[1], expected[1])


@pytest.mark.parametrize("style", ["zhong", "clustering"])
def test_the_other_styles_equal_the_cpu(clustered, on_triton, style):
    x = clustered(24, 7) * torch.linspace(0.6, 1.3, 24)[:, None]
    found = on_triton(x[:9], x[9:], 6, 3, 0.4, style=style)
    torch.testing.assert_close(
        found, op.rerank(x[:9], x[9:], 6, 3, 0.4, style=style, backend="numba"), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(("k", "half", "k2"), [(9, 5, 4), (5, 3, 7)])
def test_encoding_is_the_cpus(clustered, k, half, k2):
    """Bit for bit: counts, columns and integers, with half lists and distances of the caller's."""
    x = clustered(30, 9)
    source = FromFeatures(x[:12], x[12:], "sqeuclidean", reference_knn.knn)
    ranking = source.ranking(max(k, k2))
    crow, col, mass, weight = k_reciprocal.k_reciprocal(
        None, ranking.to(DEVICE), k, k2, half=half, measure=lambda i, j: source.pairs(i.cpu(), j.cpu()).to(DEVICE)
    )

    def measure(i, j):
        return source.pairs(torch.from_numpy(i), torch.from_numpy(j)).numpy()

    encoding = cpu.encode(ranking.numpy().astype(np.int32), k, half, k2, 12, measure, 1)
    cpu_rows.sort_rows(encoding.rows, np.arange(30, dtype=np.int32), 1)
    for found, expected in zip((crow, col, mass), encoding.rows, strict=True):
        np.testing.assert_array_equal(found.cpu().numpy(), expected)
    assert weight == encoding.weight


@pytest.mark.parametrize("pairs", [1, 40, 1 << 22])
def test_overlaps_are_sums_of_minima(monkeypatch, pairs):
    monkeypatch.setattr(kernel, "_PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randint(1, 100, (30, 30), generator=generator) * (torch.rand(30, 30, generator=generator) < 0.2)
    dense[[2, 17]] = 0
    row, col = dense.nonzero(as_tuple=True)
    crow = torch.nn.functional.pad(row.bincount(minlength=30).cumsum(0), (1, 0))
    rows = [part.to(DEVICE) for part in (crow, col.int(), dense[row, col].int())]
    inverted = kernel.invert(*rows, 12)
    expected = torch.minimum(dense[:12, None], dense[None, 12:]).sum(-1)
    for first, last in ((0, 12), (3, 4), (2, 3), (5, 11)):
        found = kernel.overlaps(*rows, inverted, first, last, 18)
        assert torch.equal(found.cpu().long(), expected[first:last])

# SPDX-License-Identifier: Apache-2.0
"""Re-ranking: published numbers, and the same from dense matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.rerank import rerank

COMBINATIONS = [(20, 6, 0.3), (10, 3, 0.3), (20, 1, 0.5), (30, 6, 0.0), (20, 6, 1.0)]


@pytest.mark.parametrize(("k1", "k2", "weight"), COMBINATIONS)
def test_golden_from_stored_distances(golden, k1, k2, weight):
    file = golden("rerank_q20_g90_sqeuclidean")
    distmats = tuple(file.tensor(name) for name in ("q_g", "q_q", "g_g"))
    found = rerank(None, None, k1, k2, weight, distmats=distmats)
    torch.testing.assert_close(found, file.tensor(f"final_k{k1}_{k2}_l{weight}"), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("k1", "k2", "weight"), COMBINATIONS)
def test_golden_from_features(golden, k1, k2, weight):
    # the file keeps cut-offs 4.6e-6 apart, so distances computed here rank the same
    file = golden("rerank_q20_g90_sqeuclidean")
    found = rerank(file.tensor("query"), file.tensor("gallery"), k1, k2, weight)
    torch.testing.assert_close(found, file.tensor(f"final_k{k1}_{k2}_l{weight}"), atol=4e-6, rtol=0)


def by_definition(distance, num_query, k1, k2, weight):
    """Dense float64 matrices and Python sets."""
    n = len(distance)
    original = (distance**2 / (distance**2).max(0)).T
    ranking = original.argsort(1, kind="stable")
    half = int(np.around(k1 / 2)) + 1

    def mutual(i, k):
        return {j for j in ranking[i, :k] if i in ranking[j, :k]}

    v = np.zeros((n, n))
    for i in range(n):
        core = mutual(i, k1 + 1)
        members = set(core)
        for q in core:
            candidate = mutual(q, half)
            if 3 * len(candidate & core) > 2 * len(candidate):
                members |= candidate
        members = sorted(members)
        v[i, members] = np.exp(-original[i, members]) / np.exp(-original[i, members]).sum()
    if k2 != 1:
        v = v[ranking[:, :k2]].mean(1)
    overlap = np.minimum(v[:num_query, None], v[None, num_query:]).sum(-1)
    return (1 - weight) * (1 - overlap / (2 - overlap)) + weight * original[:num_query, num_query:]


@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize(("q", "g"), [(1, 30), (13, 41), (30, 7)])
def test_matches_definition(clustered, distance, q, g):
    x = clustered(q + g, 10, number=q) * torch.linspace(0.8, 1.3, q + g)[:, None]
    if distance == "cosine":
        unit = F.normalize(x.double())
        whole = 1 - unit @ unit.T
    else:
        whole = (x.double()[:, None] - x.double()).square().sum(-1)
        whole = whole if distance == "sqeuclidean" else whole.sqrt()
    expected = by_definition(whole.numpy(), q, 9, 3, 0.3)
    found = rerank(x[:q], x[q:], 9, 3, 0.3, distance=distance)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (q, g))
    np.testing.assert_allclose(found.numpy(), expected, atol=4e-6)


def test_lambda_one_is_the_scaled_distance(clustered):
    x = clustered(40, 8)
    found = rerank(x[:10], x[10:], lambda_value=1.0)
    squared = (x.double()[:, None] - x.double()).square().sum(-1).square()
    scaled = (squared / squared.amax(0)).T[:10, 10:]
    torch.testing.assert_close(found.double(), scaled, atol=1e-6, rtol=0)


def test_copies_and_identical_points():
    found = rerank(torch.ones(3, 4), torch.ones(5, 4), k1=4, k2=2)
    assert torch.isfinite(found).all()
    assert found.max() <= 1


@pytest.mark.parametrize(("q", "g"), [(0, 5), (4, 0), (0, 0)])
def test_empty(q, g):
    assert tuple(rerank(torch.zeros(q, 3), torch.zeros(g, 3), 1, 1).shape) == (q, g)


def test_counts_beyond_the_data_are_clipped(clustered):
    x = clustered(8, 4)
    with pytest.warns(UserWarning, match="rerank: k1=20 is more than the data have, using 7"):
        found = rerank(x[:3], x[3:])
    assert torch.equal(found, rerank(x[:3], x[3:], 7, 6))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambda_value": 1.1}, ValueError, r"lambda_value must lie in \[0, 1\], got 1.1"),
        ({"k1": 0}, ValueError, "k1 must be at least 1, got 0"),
        ({"distance": "l1"}, ValueError, "distance must be one of 'sqeuclidean', 'euclidean', 'cosine', got 'l1'"),
        ({"query": None}, ValueError, "query and gallery must be given without distmats, got None"),
        ({"gallery": torch.ones(3, 9)}, ValueError, "gallery must have 4 columns like query, got 9"),
        ({"distmats": torch.ones(2, 3)}, TypeError, r"distmats must be three matrices \(q_g, q_q, g_g\), got Tensor"),
        (
            {"distmats": (torch.ones(2, 3), torch.ones(3, 3), torch.ones(3, 3))},
            ValueError,
            r"q_q must have shape \(2, 2\) beside q_g, got \(3, 3\)",
        ),
    ],
)
def test_rejects(options, error, message):
    with pytest.raises(error, match=f"rerank: {message}"):
        rerank(**{"query": torch.ones(2, 4), "gallery": torch.ones(3, 4), "k1": 2, "k2": 1, **options})

# SPDX-License-Identifier: Apache-2.0
"""Exact copies (frozen video frames, placeholder images, black crops) are 0 apart, in any order of the rows.

What is right is the published code's algorithm in float64, with neighbour lists by (distance, index): among
copies the published code leaves the order to chance.
"""

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from fastreid_u.ops.jaccard import jaccard_distance, jaccard_graph
from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.ops.suggest_eps import suggest_eps

SETS = 10  # of those of ``drawn``; 500 have been compared
BACKENDS = ["numba", "reference", "triton"]


def lists_by_distance_and_index(x, k1):
    """(N, k1): the published search, ties by index: with more copies than k1, a row may be missing from its own."""
    x = x.astype(np.float64)
    return np.square(x[:, None] - x).sum(-1).astype(np.float32).argsort(axis=1, kind="stable")[:, :k1]


def published_distance(x, k1, k2):
    lists, n = lists_by_distance_and_index(x, k1), len(x)
    k1 = lists.shape[1]
    k2, half = min(k2, k1), int(np.around(k1 / 2)) + 1

    def mutual(i, k):
        return {j for j in lists[i, :k] if i in lists[j, :k]}

    halves = [mutual(i, half) for i in range(n)]
    v = np.zeros((n, n))
    for i in range(n):
        own = mutual(i, k1)
        members = own.union(*(halves[q] for q in own if 3 * len(halves[q] & own) > 2 * len(halves[q])))
        if members:
            members = sorted(members)
            weight = np.exp(-np.square(x[i].astype(np.float64) - x[members]).sum(1))
            v[i, members] = weight / weight.sum()
    v = v[lists[:, :k2]].mean(axis=1)
    shared = np.stack([np.minimum(row, v).sum(axis=1) for row in v])
    return 1 - shared / (2 - shared)


def drawn(case):
    """Points around a few centres, some of them many times over, shuffled; k1, k2 and an eps that no pair is near."""
    rng = np.random.default_rng(case)
    n = int(rng.integers(20, 80))
    x = rng.normal(size=(max(1, n // 12), 6))[rng.integers(0, max(1, n // 12), n)] + 0.3 * rng.normal(size=(n, 6))
    if case % 3 == 0:
        x = np.rint(2 * x) / 2  # different rows at equal distances
    count = np.ones(n, int)
    copied = int(rng.integers(1, 4))
    count[:copied] = rng.integers(2, 101, copied)
    x = rng.permutation(x.repeat(count, axis=0)).astype(np.float32)
    return x, int(rng.integers(5, min(30, len(x)) + 1)), int(rng.integers(2, 11)), rng.uniform(0.3, 0.7)


def far_from_all(eps, distance):
    """A radius near ``eps`` that rounding does not take across a distance."""
    while np.abs(distance - eps).min() < 1e-4:
        eps += 1e-3
    return float(eps)


def equal_rows(x):
    return (x[:, None] == x).all(-1)


def assert_as_published(x, k1, k2, eps):
    expected = published_distance(x, k1, k2)
    k2 = min(k2, k1)
    found = jaccard_distance(torch.from_numpy(x), k1, k2).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert found[equal_rows(x)].max() <= 1e-6
    eps = far_from_all(eps, expected)
    labels = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(np.maximum(expected, 0))
    np.testing.assert_array_equal(pseudo_labels(torch.from_numpy(x), eps=eps, k1=k1, k2=k2).numpy(), labels)


@pytest.mark.parametrize("case", range(SETS))
def test_copies_are_as_published_with_lists_by_distance_and_index(case):
    x, k1, k2, eps = drawn(case)
    assert_as_published(x, k1, k2, eps)
    assert_as_published(x[np.random.default_rng(case).permutation(len(x))], k1, k2, eps)


@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (30, 2), (6, 6), (5, 2), (30, 30)])
@pytest.mark.parametrize("copies", [2, 11, 100])
def test_identical_rows_are_one_cluster_at_distance_0(copies, k1, k2):
    x, k1 = torch.full((copies, 4), 0.5), min(k1, copies)
    k2 = min(k2, k1)
    assert (jaccard_distance(x, k1, k2) == 0).all()
    assert (pseudo_labels(x, eps=0.25, min_samples=2, k1=k1, k2=k2) == 0).all()


@pytest.mark.parametrize("k2", [2, 6, 8])
def test_order_of_rows_is_nothing_to_copies(clustered, k2):
    x = torch.cat([clustered(60, 6), clustered(60, 6)[:2].repeat_interleave(20, 0)])
    for number in range(4):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        moved = jaccard_distance(x[order], 8, k2)
        torch.testing.assert_close(moved, jaccard_distance(x, 8, k2)[order][:, order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_about_copies(backend):
    x, k1, k2 = drawn(1)[0], 6, 3
    x = np.random.default_rng(0).permutation(np.concatenate([x[:25], x[:1].repeat(9, 0)]))
    expected = published_distance(x, k1, k2)
    x = torch.from_numpy(x)
    if backend == "triton":
        from fastreid_u.kernels.jaccard import jaccard
        from fastreid_u.kernels.k_reciprocal import k_reciprocal
        from fastreid_u.ops.k_reciprocal import sparse_rows
        from fastreid_u.ops.knn import knn

        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = x.to(device)
        graph = sparse_rows(*jaccard(*k_reciprocal(x, knn(x, k1)[1], k1, k2), 1.0)).cpu()
    else:
        graph = jaccard_graph(x, k1=k1, k2=k2, backend=backend)
    found = torch.ones(graph.shape)
    row = torch.arange(len(found)).repeat_interleave(graph.crow_indices().diff())
    found[row, graph.col_indices()] = graph.values()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6 if backend != "reference" else 2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_every_form_of_the_label_step_clusters_copies(backend):
    x = torch.full((40, 4), 0.5)
    assert (pseudo_labels(x, eps=0.25, k1=12, k2=2, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_copies_have_one_encoding(backend):
    x = torch.cat([torch.full((40, 4), 0.5), torch.eye(4)])
    rows = k_reciprocal_encoding(x, 12, 12, backend=backend).to_dense()
    assert (rows[:40] == rows[0]).all()


@pytest.mark.filterwarnings("ignore:suggest_eps. the knee is not reliable:UserWarning")
def test_suggest_eps_finds_copies_at_0():
    assert (suggest_eps(torch.full((40, 4), 0.5), k1=12, k2=2).core_distance == 0).all()


def test_without_query_expansion_a_copy_that_k1_others_precede_stands_alone():
    distance = jaccard_distance(torch.full((20, 4), 0.5), 5, 1)
    assert (distance[:5, :5] == 0).all()
    assert (distance[5:, 5:] == 1 - torch.eye(15)).all()

# SPDX-License-Identifier: Apache-2.0
"""dbscan where distances and eps are of different types: the comparison is scikit-learn's, but for one stated case."""

import itertools

import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster
import torch

import fastreid_u

DISTANCES = (np.float16, np.float32, np.float64)
NUMBERS = (float, np.float16, np.float32, np.float64)


def sklearn_labels(graph, eps, min_samples=2):
    return sklearn.cluster.DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(graph).labels_


def near_the_threshold(rng, dtype, eps):
    """(12, 12) symmetric distances: eps as each type rounds it, the numbers next to those, and some far ones."""
    around = [float(kind(eps)) for kind in NUMBERS]
    values = [np.nextafter(dtype(value), dtype(to)) for value in around for to in (0, 9)]
    values = np.array([*values, *map(dtype, around), *[dtype(3)] * 40], dtype)
    graph = rng.choice(values, (12, 12))
    graph = np.minimum(graph, graph.T)
    np.fill_diagonal(graph, 0)
    return graph


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_labels_are_scikit_learns_whatever_the_types_of_distances_and_eps(backend):
    rng = np.random.default_rng(0)
    cases, differ = 0, 0
    for dtype, number, eps in itertools.product(DISTANCES, NUMBERS, np.linspace(0.05, 0.95, 18)):
        graph, eps = near_the_threshold(rng, dtype, eps), number(eps)
        # docs/quirks.md: an eps of numpy.float64 counts as any other number, where scikit-learn leaves float32 for it
        stated = dtype is np.float32 and number is np.float64
        expected = sklearn_labels(graph, float(eps) if stated else eps)
        differ += stated and not np.array_equal(expected, sklearn_labels(graph, eps))
        forms = [graph, torch.from_numpy(graph)]
        if dtype is not np.float16:  # SciPy has no half precision
            forms.append(scipy.sparse.csr_array(graph))
        for form in forms:
            found = fastreid_u.dbscan(form, eps, 2, backend=backend)
            np.testing.assert_array_equal(found, expected, err_msg=f"{dtype} {number} {eps!r}")
        cases += 1
    assert cases > 200
    assert differ > 3, "the stated case did occur"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_distances_count_as_the_numbers_that_they_are(dtype):
    """0.6 in half precision is more than 0.6."""
    at = torch.tensor(0.6, dtype=dtype)
    dense = torch.tensor([[0.0, at], [at, 0.0]], dtype=dtype)
    for graph in (dense, dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        assert fastreid_u.dbscan(graph, 0.6, 2).tolist() == [-1, -1]
        assert fastreid_u.dbscan(graph, at.item(), 2).tolist() == [0, 0]
        assert fastreid_u.dbscan(graph, at.item() - 1e-12, 2).tolist() == [-1, -1]
        with pytest.raises(ValueError, match=r"eps must be at most radius=0\.6, got 0\.7"):
            fastreid_u.dbscan(graph, 0.7, 2, radius=0.6)
    assert fastreid_u.DBSCAN(0.6, min_samples=2).fit(dense).labels_.tolist() == [-1, -1]


def test_no_eps_reaches_an_infinite_distance():
    for dtype in (torch.float16, torch.float32, torch.float64):
        graph = torch.tensor([[0.0, torch.inf], [torch.inf, 0.0]], dtype=dtype)
        assert fastreid_u.dbscan(graph, 1e300, 1).tolist() == [0, 1]


def test_pairs_that_torch_coo_stores_twice_have_their_sum():
    graph = torch.sparse_coo_tensor([[0, 1, 0], [1, 0, 1]], [0.3, 0.6, 0.3], (2, 2))
    assert fastreid_u.dbscan(graph, 0.5, 2).tolist() == [-1, -1]
    assert fastreid_u.dbscan(graph, 0.7, 2).tolist() == [0, 0]


def test_malformed_torch_matrices_are_refused():
    wrong = torch.sparse_csc_tensor(
        torch.tensor([0, 1, 2]), torch.tensor([0, 5]), torch.ones(2), (2, 2), check_invariants=False
    )
    with pytest.raises(ValueError, match=r"dbscan: graph must hold rows in \[0, N\), got 0 to 5"):
        fastreid_u.dbscan(wrong, 0.5)
    with pytest.raises(ValueError, match=r"dbscan: graph must be square, got shape \(2, 3\)"):
        fastreid_u.dbscan(torch.ones(2, 3).to_sparse(), 0.5)
    with pytest.raises(ValueError, match=r"dbscan: graph must be square, got shape \(2, 2, 2\)"):
        fastreid_u.dbscan(torch.ones(2, 2, 2).to_sparse(), 0.5)


def test_eps_and_radius_are_compared_as_the_graph_rounds_them():
    graph = fastreid_u.jaccard_graph(torch.eye(20), k1=4, k2=2, radius=0.6)
    assert torch.equal(fastreid_u.dbscan(graph, np.float32(0.6), radius=0.6), fastreid_u.dbscan(graph, 0.6, radius=0.6))
    with pytest.raises(ValueError, match=r"eps must be at most radius=0\.6, got 0\.61"):
        fastreid_u.dbscan(graph, 0.61, radius=0.6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_torch_s_default_device_does_not_matter(backend):
    """ "meta" stands for a device that is not there."""
    dense = np.array([[0, 0.1, 9], [0.1, 0, 9], [9, 9, 0]], np.float32)
    given = torch.from_numpy(dense)
    forms = [dense, dense.tolist(), given, given.to_sparse(), given.to_sparse_csc(), scipy.sparse.csr_array(dense)]
    torch.set_default_device("meta")
    try:
        found = [fastreid_u.dbscan(form, [0.5], 2, backend=backend).tolist() for form in forms]
        fitted = [fastreid_u.DBSCAN(0.5, min_samples=2).fit(form).labels_.tolist() for form in forms]
    finally:
        torch.set_default_device(None)
    assert found == [[[0, 0, -1]]] * len(forms)
    assert fitted == [[0, 0, -1]] * len(forms)

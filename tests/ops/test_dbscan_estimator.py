# SPDX-License-Identifier: Apache-2.0
"""``DBSCAN``: scikit-learn's estimator and its rules, on the same labels."""

import pickle

import numpy as np
import pytest
import scipy.sparse
import sklearn.base
import sklearn.cluster
import sklearn.utils.validation
import torch
from sklearn.utils.estimator_checks import check_estimator

import fastreid_u


@pytest.fixture(scope="module")
def graph():
    rng = np.random.default_rng(4)
    graph = np.where(rng.random((80, 80)) < 0.2, np.round(rng.random((80, 80)), 1), 9.0).astype(np.float32)
    graph = np.minimum(graph, graph.T)
    np.fill_diagonal(graph, 0)
    return graph


def sparse(graph):
    row, column = np.nonzero(graph < 9)
    return scipy.sparse.csr_array((graph[row, column], (row, column)), shape=graph.shape)


def assert_same_fit(ours, theirs):
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_array_equal(ours.core_sample_indices_, theirs.core_sample_indices_)
    dense = [part.toarray() if scipy.sparse.issparse(part) else part for part in (ours.components_, theirs.components_)]
    np.testing.assert_array_equal(*dense)
    assert type(ours.components_) is type(theirs.components_)
    assert (ours.labels_.dtype, ours.n_features_in_) == (theirs.labels_.dtype, theirs.n_features_in_)


def test_estimator_drops_in_for_sklearn(graph) -> None:
    settings = dict(eps=0.3, min_samples=4, metric="precomputed", n_jobs=-1, algorithm="brute", leaf_size=9, p=2)
    for given in (graph, sparse(graph), scipy.sparse.csr_matrix(sparse(graph)), graph.astype(np.float16)):
        theirs, ours = sklearn.cluster.DBSCAN(**settings), fastreid_u.DBSCAN(**settings)
        np.testing.assert_array_equal(ours.fit_predict(given), theirs.fit_predict(given))
        assert_same_fit(ours, theirs)
    assert ours.fit(graph) is ours
    nothing = fastreid_u.DBSCAN(1e-3, min_samples=70).fit(graph)
    assert nothing.components_.shape == (0, 80)


def test_distances_in_torch_are_clustered_too(graph):
    expected = sklearn.cluster.DBSCAN(eps=0.3, min_samples=4, metric="precomputed").fit(graph)
    tensor = torch.from_numpy(graph)
    for given in (tensor, tensor.clone().requires_grad_()):
        assert_same_fit(fastreid_u.DBSCAN(0.3, min_samples=4).fit(given), expected)
    rows = sparse(graph)
    parts = [torch.from_numpy(np.asarray(part)) for part in (rows.indptr, rows.indices, rows.data)]
    found = fastreid_u.DBSCAN(0.3, min_samples=4).fit(torch.sparse_csr_tensor(*parts, size=graph.shape))
    np.testing.assert_array_equal(found.labels_, expected.labels_)
    assert found.components_.shape == expected.components_.shape
    half = fastreid_u.DBSCAN(0.3, min_samples=4).fit(tensor.bfloat16())
    np.testing.assert_array_equal(half.labels_, fastreid_u.dbscan(tensor.bfloat16(), 0.3, 4))


def test_other_metrics_and_sample_weight_are_scikit_learns(graph):
    x = np.random.default_rng(0).normal(size=(60, 2))
    for settings in ({"metric": "euclidean"}, {"metric": "minkowski", "p": 1.5, "algorithm": "ball_tree"}):
        ours, theirs = (
            made(0.4, min_samples=3, **settings).fit(x) for made in (fastreid_u.DBSCAN, sklearn.cluster.DBSCAN)
        )
        assert_same_fit(ours, theirs)
    weight = np.random.default_rng(1).random(80) * 0.8
    theirs = sklearn.cluster.DBSCAN(0.3, min_samples=4, metric="precomputed").fit(graph, sample_weight=weight)
    for given in (graph, torch.from_numpy(graph)):
        assert_same_fit(fastreid_u.DBSCAN(0.3, min_samples=4).fit(given, sample_weight=weight), theirs)
    assert len(theirs.core_sample_indices_) < len(fastreid_u.DBSCAN(0.3, min_samples=4).fit(graph).core_sample_indices_)


def failures(estimator):
    with np.errstate(all="ignore"):
        found = check_estimator(estimator, on_fail=None, on_skip=None)
    assert len(found) > 40
    return {check["check_name"]: type(check["exception"]) for check in found if check["status"] == "failed"}


@pytest.mark.skipif(not hasattr(sklearn.utils.validation, "validate_data"), reason="scikit-learn before 1.6")
@pytest.mark.filterwarnings("ignore")  # of scikit-learn's own checks
@pytest.mark.parametrize("metric", ["precomputed", "euclidean"])
def test_scikit_learns_own_checks_pass_where_its_own_estimator_passes(metric):
    assert failures(fastreid_u.DBSCAN(metric=metric)) == failures(sklearn.cluster.DBSCAN(metric=metric))
    assert sklearn.base.is_clusterer(fastreid_u.DBSCAN(metric=metric))


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, {3: np.nan}, "contains NaN"),
        ({}, {3: np.inf}, "contains infinity"),
        ({}, {3: -1}, "X must hold no negative distance"),
        ({"eps": 0}, {}, "'eps' parameter of DBSCAN must be"),
        ({"min_samples": 0}, {}, "'min_samples' parameter of DBSCAN must be"),
        ({"metric": "l3"}, {}, "'metric' parameter of DBSCAN must be"),
        ({"algorithm": "none"}, {}, "'algorithm' parameter of DBSCAN must be"),
    ],
)
def test_refusals(graph, settings, change, message):
    for given in (graph.copy(), torch.from_numpy(graph.copy())):
        for place, value in change.items():
            given[place] = value
        with pytest.raises(ValueError, match=message):
            fastreid_u.DBSCAN(**settings).fit(given)


def test_the_estimator_can_be_cloned_and_pickled(graph):
    found = sklearn.base.clone(fastreid_u.DBSCAN(0.3, min_samples=2)).set_params(eps=0.4)
    expected = sklearn.cluster.DBSCAN(0.4, min_samples=2, metric="precomputed")
    assert found.get_params() == expected.get_params()
    assert repr(found) == "DBSCAN(eps=0.4, min_samples=2)"
    with pytest.raises(ValueError, match="Invalid parameter 'radius'"):
        found.set_params(radius=1)
    again = pickle.loads(pickle.dumps(found.fit(graph)))
    np.testing.assert_array_equal(again.labels_, found.labels_)


@pytest.mark.parametrize("form", [np.asarray, torch.as_tensor, scipy.sparse.csr_array], ids=["numpy", "torch", "scipy"])
def test_messages_call_the_matrix_as_the_estimator_does(form):
    with pytest.raises(ValueError, match=r"^DBSCAN: X must be square, got shape \(4, 3\)"):
        fastreid_u.DBSCAN().fit(form(np.ones((4, 3))))
    with pytest.raises(ValueError, match=r"^DBSCAN: X must hold no negative distance, got one in row 0"):
        fastreid_u.DBSCAN().fit(form(-np.ones((3, 3))))

# SPDX-License-Identifier: Apache-2.0
"""``DBSCAN``: the face of scikit-learn's estimator, on the same labels."""

import numpy as np
import pytest
import sklearn.base
import sklearn.cluster
import torch

import fastreid_u


def test_estimator_drops_in_for_sklearn() -> None:
    rng = np.random.default_rng(4)
    graph = np.where(rng.random((80, 80)) < 0.2, np.round(rng.random((80, 80)), 1), 9.0).astype(np.float32)
    graph = np.minimum(graph, graph.T)
    np.fill_diagonal(graph, 0)
    theirs = sklearn.cluster.DBSCAN(eps=0.3, min_samples=4, metric="precomputed", n_jobs=-1)
    ours = fastreid_u.DBSCAN(eps=0.3, min_samples=4, metric="precomputed", n_jobs=-1)
    expected, labels = theirs.fit_predict(graph), ours.fit_predict(graph)
    assert isinstance(labels, np.ndarray)
    assert labels.dtype == expected.dtype
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_array_equal(ours.core_sample_indices_, theirs.core_sample_indices_)
    assert ours.fit(torch.from_numpy(graph)) is ours
    assert repr(fastreid_u.DBSCAN()) == "DBSCAN(eps=0.5, min_samples=5, metric='precomputed', n_jobs=None)"
    with pytest.raises(ValueError, match="DBSCAN: metric must be one of 'precomputed', got 'euclidean'"):
        fastreid_u.DBSCAN(metric="euclidean").fit(graph)


def test_the_estimator_can_be_cloned():
    found = sklearn.base.clone(fastreid_u.DBSCAN(0.3, min_samples=2)).set_params(eps=0.4)
    assert found.get_params() == {"eps": 0.4, "min_samples": 2, "metric": "precomputed", "n_jobs": None}
    with pytest.raises(ValueError, match="DBSCAN: params must be one of"):
        found.set_params(radius=1)

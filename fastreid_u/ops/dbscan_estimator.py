# SPDX-License-Identifier: Apache-2.0
"""DBSCAN on a graph of distances as an estimator of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import sklearn.cluster

from fastreid_u.ops._distance_graph import DistanceGraph, read_graph
from fastreid_u.ops.dbscan import cluster

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before scikit-learn 1.6 it was a method

    def validate_data(estimator: Any, X: Any, **rules: Any) -> Any:
        return estimator._validate_data(X, **rules)


class DBSCAN(sklearn.cluster.DBSCAN):
    """scikit-learn's estimator, with :func:`dbscan` inside where distances are given; their fit does all the rest.

    Args:
        eps: as in :func:`dbscan`, one number.
        min_samples: as in :func:`dbscan`.
        metric: "precomputed", with distances (N, N) of any form that :func:`dbscan` takes, or any other of theirs, with
            features (N, D).
        metric_params, algorithm, leaf_size, p, n_jobs: theirs, for the other metrics. :func:`dbscan` follows
            ``torch.set_num_threads``.

    Attributes:
        labels_: (N,) int64 NumPy, -1 = noise.
        core_sample_indices_: ascending int64 NumPy.
        components_: the rows of X at those indices, NumPy or, of a sparse X, SciPy.
        n_features_in_: columns of X.
    """

    def __init__(
        self,
        eps: float = 0.5,
        *,
        min_samples: int = 5,
        metric: Any = "precomputed",
        metric_params: dict[str, Any] | None = None,
        algorithm: str = "auto",
        leaf_size: int = 30,
        p: float | None = None,
        n_jobs: int | None = None,
    ) -> None:
        super().__init__(
            eps=eps, min_samples=min_samples, metric=metric, metric_params=metric_params, algorithm=algorithm,
            leaf_size=leaf_size, p=p, n_jobs=n_jobs,
        )  # fmt: skip

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> DBSCAN:
        """Cluster ``X``. ``y`` is ignored; with ``sample_weight`` (N,) their fit does it, whatever the metric.

        Raises:
            ValueError: a parameter out of range; NaN, infinity or a negative distance; a matrix that is not square.
            TypeError: a matrix of another kind.
        """
        if self.metric != "precomputed":
            return super().fit(X, y, sample_weight)
        graph = None
        if not (isinstance(X, np.ndarray) or scipy.sparse.issparse(X)) and hasattr(X, "__dlpack__"):
            graph = read_graph("DBSCAN", X, "X")
            X = _on_the_cpu(graph)
        if sample_weight is not None:
            return super().fit(X, y, sample_weight)
        self._validate_params()
        X = validate_data(self, X, accept_sparse="csr")
        labels, core = cluster(graph or read_graph("DBSCAN", X, "X"), [self.eps], self.min_samples)
        self.labels_ = labels[0].cpu().numpy()
        self.core_sample_indices_ = core[0].nonzero().flatten().cpu().numpy()
        self.components_ = X[self.core_sample_indices_].copy()
        return self


def _on_the_cpu(graph: DistanceGraph) -> np.ndarray | scipy.sparse.csr_array:
    """The distances as scikit-learn takes them."""
    graph = graph.to("cpu")
    if graph.indptr is None:
        return graph.data.numpy()
    parts = (graph.data.numpy(), graph.indices.numpy(), graph.indptr.numpy())
    return scipy.sparse.csr_array(parts, shape=(graph.n, graph.n))

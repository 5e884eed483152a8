# SPDX-License-Identifier: Apache-2.0
"""Features to pseudo-labels: the whole clustering step of an epoch."""

from __future__ import annotations

from torch import Tensor

from fastreid_u._checks import require_features, require_in_range, require_positive_int
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.k_reciprocal import neighbour_counts, neighbours


def pseudo_labels(
    x: Tensor, *, eps: float = 0.6, min_samples: int = 4, k1: int = 30, k2: int = 6, compat: bool = False
) -> Tensor:
    """DBSCAN labels of ``x`` in the Jaccard distance of k-reciprocal neighbourhoods.

    Args:
        x: (N, D) floating point features, any device; taken in float32. Unit rows are usual, not needed.
        eps: neighbourhood radius, in (0, 1), inclusive, compared in float32.
        min_samples: points within eps, the point itself included, that make a core point.
        k1, k2, compat: as in :func:`fastreid_u.jaccard_graph`.

    Returns:
        (N,) int64 on ``x``'s device: -1 for noise, else a cluster 0 .. C - 1, numbered as scikit-learn numbers them.
        The same as ``dbscan(jaccard_graph(x, radius=eps, ...), eps, min_samples)``.

    Raises:
        TypeError, ValueError: wrong type, shape or count; NaN or infinity in ``x`` (the message counts the rows).

    Memory: 12 bytes for each of the N k1 neighbours and of the pairs within eps, which is O(N k1) on data that
    cluster; if all features collapse to one point every pair is within eps, 12 N^2 bytes. Rows of zeros, as a dead
    feature extractor makes them, are copies of each other and cluster as copies do (see :func:`jaccard_graph`).
    """
    x = require_features("pseudo_labels", "x", x)
    eps = require_in_range("pseudo_labels", "eps", eps, 0, 1, open_low=True, open_high=True)
    min_samples = require_positive_int("pseudo_labels", "min_samples", min_samples)
    k1, k2 = neighbour_counts("pseudo_labels", k1, k2, len(x))
    nearest = neighbours("pseudo_labels", x, k1, None)
    graph = jaccard_graph(x, k1=k1, k2=k2, radius=eps, knn=nearest, compat=compat)
    return dbscan(graph, eps, min_samples, radius=eps)

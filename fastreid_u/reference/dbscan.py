# SPDX-License-Identifier: Apache-2.0
"""DBSCAN on a graph of distances, from its definition.

Ester, Kriegel, Sander, Xu, "A Density-Based Algorithm for Discovering Clusters in Large Spatial Databases with
Noise", KDD 1996. Points are visited by index, which fixes the numbers of the clusters and, for a point at the border of
two, the cluster that takes it. Cost: a Python loop over points and near entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse
import torch
from torch import Tensor


def dbscan(
    graph: Tensor | np.ndarray | scipy.sparse.sparray,
    eps: float | Sequence[float],
    min_samples: int = 4,
    *,
    radius: float | None = None,
) -> Tensor:
    """Cluster numbers of the N points of ``graph``; -1 is noise.

    Args:
        graph: (N, N) distances, float32 or float64: dense (torch, NumPy) or sparse (``torch.sparse_csr``, SciPy). In a
            sparse graph an entry that is not stored is farther than any eps, but on the diagonal it is 0.
        eps: distance up to which two points are neighbours, inclusive, rounded to the graph's dtype; or several.
        min_samples: neighbours that make a core point; a point counts itself if its diagonal entry is <= eps.
        radius: the distance up to which a sparse graph is complete; no eps may be larger.

    Returns:
        (N,) int64, or (len(eps), N) for several eps.
    """
    if isinstance(eps, Sequence):
        return torch.stack([dbscan(graph, e, min_samples, radius=radius) for e in eps])
    if radius is not None and eps > radius:
        raise ValueError(f"dbscan: eps must be at most radius={radius}, got {eps}")

    neighbours = neighbourhoods(graph, eps)
    core = [len(near) >= min_samples for near in neighbours]
    labels = [-1] * len(neighbours)
    cluster = 0
    for seed in range(len(neighbours)):
        if not core[seed] or labels[seed] != -1:
            continue
        waiting = [seed]
        while waiting:
            point = waiting.pop()
            if labels[point] != -1:
                continue
            labels[point] = cluster
            if core[point]:
                waiting.extend(neighbours[point])
        cluster += 1
    return torch.tensor(labels, dtype=torch.int64, device="cpu")


def core_points(graph: Tensor | np.ndarray | scipy.sparse.sparray, eps: float, min_samples: int = 4) -> Tensor:
    """(N,) bool: which points are core, by the same rule."""
    core = [len(near) >= min_samples for near in neighbourhoods(graph, eps)]
    return torch.tensor(core, dtype=torch.bool, device="cpu")


def neighbourhoods(graph: Tensor | np.ndarray | scipy.sparse.sparray, eps: float) -> list[list[int]]:
    """For each point the points within eps of it, itself included unless its diagonal entry is beyond eps."""
    if isinstance(graph, Tensor) and graph.layout == torch.sparse_csr:
        parts = [part.detach().cpu().numpy() for part in (graph.values(), graph.col_indices(), graph.crow_indices())]
        graph = scipy.sparse.csr_array(tuple(parts), shape=tuple(graph.shape))
    if not scipy.sparse.issparse(graph):
        dense = np.asarray(graph.detach().cpu() if isinstance(graph, Tensor) else graph)
        return [np.flatnonzero(row <= dense.dtype.type(eps)).tolist() for row in dense]

    sparse = graph.tocsr()
    found = []
    for i, (begin, end) in enumerate(zip(sparse.indptr[:-1], sparse.indptr[1:], strict=True)):
        columns, distances = sparse.indices[begin:end], sparse.data[begin:end]
        near = columns[distances <= distances.dtype.type(eps)].tolist()
        found.append(near if i in columns else [*near, i])
    return found

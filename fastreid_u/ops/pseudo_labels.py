# SPDX-License-Identifier: Apache-2.0
"""Features to pseudo-labels: the whole clustering step of an epoch."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastreid_u import _env
from fastreid_u._checks import require_features, require_in_range, require_positive_int
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.k_reciprocal import index_array, neighbour_counts, neighbours


def pseudo_labels(
    x: Tensor,
    *,
    eps: float | Sequence[float] = 0.6,
    min_samples: int = 4,
    k1: int = 30,
    k2: int = 6,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
    backend: str = "auto",
) -> Tensor:
    """DBSCAN labels of ``x`` in the Jaccard distance of k-reciprocal neighbourhoods.

    Args:
        x: (N, D) floating point features, any device; taken in float32. Unit rows are usual, not needed.
        eps: neighbourhood radius, in (0, 1), inclusive, compared in float32. A sequence gives one row of labels for
            each, on one encoding.
        min_samples: points within eps, the point itself included, that make a core point.
        k1, k2, knn, compat: as in :func:`fastreid_u.jaccard_graph`.
        backend: "auto", "numba" (a CPU, as many threads as ``torch.get_num_threads()``), "triton" (a GPU: the graph of
            that backend, and the DBSCAN core) or "reference" (its graph and its DBSCAN); anything but "auto" runs there
            or raises.

    Returns:
        (N,) int64 on ``x``'s device: -1 for noise, else a cluster 0 .. C - 1, numbered as scikit-learn numbers them;
        (len(eps), N) for a sequence. The same as ``dbscan(jaccard_graph(x, radius=eps, ...), eps, min_samples)`` on
        the same backend.

    Raises:
        TypeError, ValueError: wrong type, shape or count; NaN or infinity in ``x`` (the message counts the rows).

    "numba" stores no pair within eps, so memory does not depend on how many there are: 25 N k1 bytes for neighbour
    lists, and with m entries in the encoding (50 to 100 a row with the defaults) 16 m at the peak and about 40 N for
    the clustering. "triton" and the reference store the graph, 12 bytes for each pair within eps, which is 12 N^2 if
    all features collapse to one point. Rows of zeros, as a dead feature extractor makes them, are copies of each other
    and cluster as copies do (see :func:`fastreid_u.jaccard_graph`).
    """
    op = "pseudo_labels"
    x = require_features(op, "x", x)
    several = not isinstance(eps, numbers.Real)
    radii = [require_in_range(op, "eps", e, 0, 1, open_low=True, open_high=True) for e in (eps if several else [eps])]
    if not radii:
        raise ValueError(f"{op}: eps must name at least one radius, got an empty sequence")
    min_samples = require_positive_int(op, "min_samples", min_samples)
    k1, k2 = neighbour_counts(op, k1, k2, len(x))
    numba, triton = _env.numba(), _env.triton()
    table = {
        "numba": _numba if numba.present else numba.detail,
        "triton": _triton if triton.present else triton.detail,
        "reference": _by_graph,
    }
    run = choose(op, x.device, backend, table)
    knn = neighbours(op, x, k1, knn)
    labels = run(x, eps=radii, min_samples=min_samples, k1=k1, k2=k2, knn=knn, compat=compat)
    return labels if several else labels[0]


def _numba(
    x: Tensor, *, eps: list[float], min_samples: int, k1: int, k2: int, knn: tuple[Tensor, Tensor], compat: bool
) -> Tensor:
    from fastreid_u.cpu import pseudo_labels as cpu

    if len(x) == 0:
        return torch.empty(len(eps), 0, dtype=torch.int64)
    lists, threads = index_array(knn, k1), torch.get_num_threads()
    x = x.contiguous().numpy()
    return torch.from_numpy(cpu.pseudo_labels(x, lists, k2, eps, min_samples, compat=compat, threads=threads))


def _triton(x: Tensor, *, eps: list[float], min_samples: int, **encoding: object) -> Tensor:
    graph = jaccard_graph(x, radius=max(eps), backend="triton", **encoding)
    return dbscan(graph, eps, min_samples, radius=max(eps))


def _by_graph(x: Tensor, *, eps: list[float], min_samples: int, **encoding: object) -> Tensor:
    graphs = {e: jaccard_graph(x, radius=e, backend="reference", **encoding) for e in eps}
    return torch.stack([dbscan(graphs[e], e, min_samples, radius=e, backend="reference") for e in eps])

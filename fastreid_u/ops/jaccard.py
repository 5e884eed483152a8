# SPDX-License-Identifier: Apache-2.0
"""Jaccard distance between k-reciprocal neighbourhoods: the metric that pseudo-labels are clustered in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastreid_u._checks import require_features, require_in_range
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops.k_reciprocal import index_array, neighbour_counts, neighbours, sparse_rows
from fastreid_u.reference import jaccard as reference


def jaccard_graph(
    x: Tensor,
    k1: int = 30,
    k2: int | None = None,
    *,
    radius: float = 1.0,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The pairs within ``radius`` in Jaccard distance, as a sparse matrix; what :func:`fastreid_u.dbscan` reads.

    Args:
        x: (N, D) floating point, any device; taken in float32.
        k1: neighbours examined per row, the row itself included.
        k2: rows averaged in local query expansion, at most k1; 1 turns it off. None: 6, or k1 if that is less.
        radius: largest distance kept, in [0, 1], inclusive, compared in float32. Give the eps of the clustering to
            keep the graph small.
        knn: a ready ``(sq_dist, index)`` of :func:`fastreid_u.knn` on ``x``, at least k1 columns; saves the search.
        compat: weigh neighbours by 2 - 2 x.y as most published code does; differs only for rows not of unit length.
        backend: "auto", "numba" (a CPU, as many threads as ``torch.get_num_threads()``), "triton" (a GPU) or
            "reference"; anything but "auto" runs there or raises.

    Returns:
        ``torch.sparse_csr`` (N, N) float32 on ``x``'s device. Stored are the pairs with J <= radius and J < 1,
        the diagonal included and J = 0 as an explicit zero; all others are farther. Bitwise symmetric, columns
        ascending, indices int64. Never N x N: 12 bytes a stored pair, as much again while it is
        put together, and O(N) for the row in work.

    Raises:
        TypeError, ValueError: wrong type, shape or count, NaN or infinity; the message names argument, rule and value.

    "numba" and "triton" encode in fixed point and add integers, so J is exact for that encoding, rounded once, the same
    for any number of threads or order of atomics, and 0 for equal rows only; the reference adds float32 in ascending
    order of columns, as published. They differ by less than 2e-6, which matters where distances pile up: pairs that
    share m of their k2 rows and nothing else are 1 - m / (2 k2 - m) apart, 0.5 for k2 = 6 and m = 4, and only exact
    sums say so.

    Copies of a point are 0 apart, in any order of the rows, for k2 of 2 and more: query expansion averages the first k2
    rows by (distance, index), which are the same for all copies. That a row always is in its own list decides who is
    whose neighbour and no more. With k2 = 1 a copy that k1 others precede stands alone, as in the published code. Rows
    of zeros are copies of each other. k1 and k2 beyond N, and k2 beyond k1, are clipped with one warning. Not
    differentiable.
    Zhong et al., CVPR 2017, section 3.3, with the neighbour counts of the published clustering code.
    """
    x, k1, k2, knn = _prepared("jaccard_graph", x, k1, k2, knn)
    radius = require_in_range("jaccard_graph", "radius", radius, 0, 1)
    runs = {"numba": _numba_graph, "triton": _triton_graph, "reference": reference.jaccard_graph}
    run = choose("jaccard_graph", x.device, backend, **runs)
    return run(x, k1=k1, k2=k2, radius=radius, knn=knn, compat=compat)


def jaccard_distance(
    x: Tensor,
    k1: int = 30,
    k2: int | None = None,
    *,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The dense Jaccard distance matrix that published code expects; :func:`jaccard_graph` is the small form.

    Args:
        x, k1, k2, knn, compat, backend: as in :func:`jaccard_graph`.

    Returns:
        (N, N) float32 on ``x``'s device, symmetric, in [0, 1]. Needs 4 N^2 bytes: 0.67 GB for the 12,936 training
        images of Market-1501, 4.3 GB for the 32,621 of MSMT17.

    Raises:
        TypeError, ValueError: as :func:`jaccard_graph`.
    """
    x, k1, k2, knn = _prepared("jaccard_distance", x, k1, k2, knn)
    runs = {"numba": _numba_distance, "triton": _triton_distance, "reference": reference.jaccard_distance}
    return choose("jaccard_distance", x.device, backend, **runs)(x, k1, k2, knn=knn, compat=compat)


def _numba_graph(x: Tensor, *, k1: int, k2: int, radius: float, knn: tuple[Tensor, Tensor], compat: bool) -> Tensor:
    from fastreid_u.cpu import jaccard as cpu

    if len(x) == 0:
        return sparse_rows(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    x, lists = x.contiguous().numpy(), index_array(knn, k1)
    return sparse_rows(*cpu.jaccard_graph(x, lists, k2, radius, compat=compat, threads=torch.get_num_threads()))


def _numba_distance(x: Tensor, k1: int, k2: int, *, knn: tuple[Tensor, Tensor], compat: bool) -> Tensor:
    graph = _numba_graph(x, k1=k1, k2=k2, radius=1.0, knn=knn, compat=compat)
    start = graph.crow_indices()
    dense = torch.ones(graph.shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    for i, row in enumerate(dense):
        stored = slice(start[i], start[i + 1])
        row[graph.col_indices()[stored]] = graph.values()[stored]
    return dense


def _triton_graph(x: Tensor, *, k1: int, k2: int, radius: float, knn: tuple[Tensor, Tensor], compat: bool) -> Tensor:
    from fastreid_u.kernels.jaccard import jaccard
    from fastreid_u.kernels.k_reciprocal import k_reciprocal

    return sparse_rows(*jaccard(*k_reciprocal(x, knn[1], k1, k2, compat=compat), radius))


def _triton_distance(x: Tensor, k1: int, k2: int, *, knn: tuple[Tensor, Tensor], compat: bool) -> Tensor:
    graph = _triton_graph(x, k1=k1, k2=k2, radius=1.0, knn=knn, compat=compat)
    dense = torch.ones(graph.shape, dtype=torch.float32, device=x.device)
    row = torch.arange(len(x), device=x.device).repeat_interleave(graph.crow_indices().diff())
    dense[row, graph.col_indices()] = graph.values()
    return dense


def _prepared(op: str, x: object, k1: int, k2: int | None, knn: tuple[Tensor, Tensor] | None):
    x = require_features(op, "x", x)
    k1, k2 = neighbour_counts(op, k1, k2, len(x), stacklevel=4)
    return x, k1, k2, neighbours(op, x, k1, knn)

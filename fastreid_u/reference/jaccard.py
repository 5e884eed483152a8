# SPDX-License-Identifier: Apache-2.0
"""Jaccard distance between k-reciprocal encodings, by inverted lists as in the published code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .k_reciprocal import encode, to_torch, working_dtype
from .knn import knn as nearest_neighbours


def shared_mass(v: sparse.csr_array, rows: Iterable[int]) -> Iterator[np.ndarray]:
    """For each of ``rows`` the vector ``sum over l of min(v[i, l], v[j, l])`` over all j.

    Terms are added in ``v``'s dtype with l ascending, so the result for (i, j) is bitwise that for (j, i).
    """
    inverted = v.tocsc()
    start, length = inverted.indptr[:-1].astype(np.int64), np.diff(inverted.indptr)
    for i in rows:
        own = slice(v.indptr[i], v.indptr[i + 1])
        columns = v.indices[own]
        count = length[columns]
        # positions of all entries of these columns, one column after the other
        entry = np.repeat(start[columns] - count.cumsum() + count, count) + np.arange(count.sum())
        mass = np.zeros(v.shape[0], v.dtype)
        np.add.at(mass, inverted.indices[entry], np.minimum(np.repeat(v.data[own], count), inverted.data[entry]))
        yield mass


def to_distance(mass: np.ndarray) -> np.ndarray:
    """``1 - mass / (2 - mass)``, at least 0: rows sum to 1, so the union holds what the overlap leaves of 2."""
    return np.maximum(1 - mass / (2 - mass), 0)


@torch.no_grad()
def jaccard_graph(
    x: Tensor,
    *,
    k1: int = 30,
    k2: int = 6,
    radius: float = 1.0,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
) -> Tensor:
    """Pairs at Jaccard distance J <= radius and J < 1 as ``torch.sparse_csr`` (N, N) in ``x``'s dtype.

    ``radius`` is compared in that dtype. Temporary memory is O(N) a row beside the result.
    """
    x = working_dtype(x)
    n, dtype = len(x), np.dtype(str(x.dtype).removeprefix("torch."))
    indptr, columns, values = np.zeros(n + 1, np.int64), [np.zeros(0, np.int64)], [np.zeros(0, dtype)]
    if n:
        index = nearest_neighbours(x, k1)[1] if knn is None else knn[1]
        v = encode(x, index, k1, k2, compat)
        for i, mass in enumerate(shared_mass(v, range(n))):
            met = mass.nonzero()[0]
            distance = to_distance(mass[met])
            near = (distance <= dtype.type(radius)) & (distance < 1)
            columns.append(met[near])
            values.append(distance[near])
            indptr[i + 1] = indptr[i] + len(columns[-1])
    graph = sparse.csr_array((np.concatenate(values), np.concatenate(columns), indptr), shape=(n, n))
    return to_torch(graph, x.device)


@torch.no_grad()
def jaccard_distance(
    x: Tensor, k1: int = 30, k2: int = 6, *, knn: tuple[Tensor, Tensor] | None = None, compat: bool = False
) -> Tensor:
    """The dense (N, N) matrix: what :func:`jaccard_graph` stores, and 1 elsewhere."""
    graph = jaccard_graph(x, k1=k1, k2=k2, knn=knn, compat=compat)
    row = torch.arange(len(x), device=x.device).repeat_interleave(graph.crow_indices().diff())
    dense = torch.ones(graph.shape, dtype=graph.dtype, device=x.device)
    dense[row, graph.col_indices()] = graph.values()
    return dense

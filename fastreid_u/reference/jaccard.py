# SPDX-License-Identifier: Apache-2.0
"""Jaccard distance between k-reciprocal encodings, by inverted lists over dense matrices as in the published code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .k_reciprocal import encode, to_torch, working_dtype
from .knn import knn as nearest_neighbours


def shared_mass(v: np.ndarray, rows: Iterable[int]) -> Iterator[np.ndarray]:
    """For each of ``rows`` the vector ``sum over l of min(v[i, l], v[j, l])`` over all j.

    Terms are added in ``v``'s dtype with l ascending, so the result for (i, j) is bitwise that for (j, i).
    """
    holders = [column.nonzero()[0] for column in v.T]
    for i in rows:
        mass = np.zeros(len(v), v.dtype)
        for column in v[i].nonzero()[0]:
            met = holders[column]
            mass[met] += np.minimum(v[i, column], v[met, column])
        yield mass


def to_distance(mass: np.ndarray) -> np.ndarray:
    """``1 - mass / (2 - mass)``, at least 0: rows sum to 1, so the union holds what the overlap leaves of 2."""
    return np.maximum(1 - mass / (2 - mass), 0)


@torch.no_grad()
def jaccard_graph(
    x: Tensor,
    k1: int = 30,
    k2: int | None = None,
    *,
    radius: float = 1.0,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
) -> Tensor:
    """Pairs at Jaccard distance J <= radius and J < 1 as ``torch.sparse_csr`` (N, N) in ``x``'s dtype.

    ``radius`` is compared in that dtype. Takes 8 N^2 bytes for the encoding while it runs.
    """
    x = working_dtype(x)
    n, dtype = len(x), np.dtype(str(x.dtype).removeprefix("torch."))
    indptr, columns, values = np.zeros(n + 1, np.int64), [np.zeros(0, np.int64)], [np.zeros(0, dtype)]
    if n:
        index = nearest_neighbours(x, k1)[1] if knn is None else knn[1]
        v = encode(x, index, k1, k2, compat)
        for i, mass in enumerate(shared_mass(v, range(n))):
            distance = to_distance(mass)
            near = ((distance <= dtype.type(radius)) & (distance < 1)).nonzero()[0]
            columns.append(near)
            values.append(distance[near])
            indptr[i + 1] = indptr[i] + len(near)
    graph = sparse.csr_array((np.concatenate(values), np.concatenate(columns), indptr), shape=(n, n))
    return to_torch(graph, x.device)


@torch.no_grad()
def jaccard_distance(
    x: Tensor, k1: int = 30, k2: int | None = None, *, knn: tuple[Tensor, Tensor] | None = None, compat: bool = False
) -> Tensor:
    """The dense (N, N) matrix in ``x``'s dtype. Takes 8 N^2 bytes more while it runs."""
    x = working_dtype(x)
    if len(x) == 0:
        return x.new_zeros(0, 0)
    index = nearest_neighbours(x, k1)[1] if knn is None else knn[1]
    v = encode(x, index, k1, k2, compat)
    distance = np.empty_like(v)
    for i, mass in enumerate(shared_mass(v, range(len(v)))):
        distance[i] = to_distance(mass)
    return torch.from_numpy(distance).to(x.device)

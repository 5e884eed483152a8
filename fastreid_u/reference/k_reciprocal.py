# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal encoding with the neighbour counts of the published clustering code, in its dense form.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, sections 3.2 to 3.4. As
published: a Python loop over rows for the sets, for the weights and for query expansion, and matrices N x N.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .knn import knn as nearest_neighbours


def reciprocal_sets(ranking: np.ndarray, k: int, half: int) -> Iterator[np.ndarray]:
    """The expanded reciprocal neighbours of every row, ascending.

    ``ranking`` (N, at least k and half) holds neighbour indices, self included. With R(i) the neighbours among the
    first ``k`` that have i among theirs and H(q) the same among the first ``half``, row i has R(i) joined by every
    H(q), q in R(i), of which more than two thirds lie in R(i) already.
    """
    mutual, mutual_half = ([_mutual(ranking, i, k) for i in range(len(ranking))] for k in (k, half))
    for own in mutual:
        members = own
        for q in own:
            shared = np.intersect1d(mutual_half[q], own)  # with the set as it was, not as it grows
            if 3 * len(shared) > 2 * len(mutual_half[q]):  # in integers, so 2/3 itself is out
                members = np.append(members, mutual_half[q])
        yield np.unique(members)


def _mutual(ranking: np.ndarray, i: int, k: int) -> np.ndarray:
    forward = ranking[i, :k]
    backward = ranking[forward, :k]
    return forward[(backward == i).any(axis=1)]


def expand_query(v: np.ndarray, ranking: np.ndarray, k2: int) -> np.ndarray:
    """Row i becomes the mean of the rows of ``v`` that the first ``k2`` of ``ranking[i]`` name, added in that order."""
    expanded = np.empty_like(v)
    for i, nearest in enumerate(ranking[:, :k2]):
        expanded[i] = v[nearest].mean(axis=0)
    return expanded


def averaged_lists(rows: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """``ranking``, which has the row itself first, by (distance, index).

    The two differ where copies of a lower index come before the row. The lowest of the copies has none before it, so
    its list is in that order already, and copies have one list, also where it has no room for all of them.
    """
    if ranking.shape[1] == 1:
        return ranking
    first = np.arange(len(ranking))
    for i, (own, nearest) in enumerate(ranking[:, :2]):
        if own == i and nearest < i and _sq_dist(rows[i], rows[[nearest]], compat=False) == 0:
            first[i] = nearest
    return ranking[first]


def encode(x: Tensor, index: Tensor, k1: int, k2: int | None, compat: bool) -> np.ndarray:
    """The encoding, dense (N, N), in ``x``'s dtype; ``index`` (N, at least k1) ranks the neighbours."""
    n = len(x)
    k1 = min(k1, n)
    k2 = min(6 if k2 is None else k2, k1)
    rows, ranking = x.cpu().numpy(), index[:, :k1].cpu().numpy()
    half = int(np.around(k1 / 2)) + 1  # np.around rounds halves to even, as published: k1 = 25 gives 12 + 1
    v = np.zeros((n, n), rows.dtype)
    for i, members in enumerate(reciprocal_sets(ranking, k1, half)):
        if len(members):
            sq_dist = _sq_dist(rows[i], rows[members], compat)
            weight = np.exp(sq_dist.min() - sq_dist)  # softmax of -sq_dist; far-off sets do not underflow
            v[i, members] = weight / weight.sum()
    return v if k2 == 1 else expand_query(v, averaged_lists(rows, ranking), k2)


def _sq_dist(row: np.ndarray, others: np.ndarray, compat: bool) -> np.ndarray:
    """Summed in float64 and rounded once."""
    row, exact = row.astype(np.float64), others.astype(np.float64)
    if compat:  # the published weight, right for unit rows only: |x|^2 + |y|^2 taken as 2
        return (2 - 2 * (exact @ row)).astype(others.dtype)
    return np.square(row - exact).sum(axis=1).astype(others.dtype)


def to_torch(matrix: sparse.csr_array, device: torch.device) -> Tensor:
    """A scipy CSR matrix as ``torch.sparse_csr`` with int64 indices; explicit zeros stay."""
    with warnings.catch_warnings():
        for notice in ("Sparse CSR tensor support is in beta", "Sparse invariant checks are implicitly disabled"):
            warnings.filterwarnings("ignore", notice, UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)).to(device),
            torch.from_numpy(matrix.indices.astype(np.int64)).to(device),
            torch.from_numpy(matrix.data).to(device),
            matrix.shape,
            device=device,
            check_invariants=False,
        )


def working_dtype(x: Tensor) -> Tensor:
    """Half precision widens to float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@torch.no_grad()
def k_reciprocal_encoding(
    x: Tensor, k1: int = 30, k2: int | None = None, *, knn: tuple[Tensor, Tensor] | None = None, compat: bool = False
) -> Tensor:
    """The soft membership matrix (N, N), ``torch.sparse_csr``, rows summing to 1.

    A row that misses itself in its own list (possible in a given ``knn``) may end with no members: it stays empty.
    Takes 8 N^2 bytes while it runs.
    """
    x = working_dtype(x)
    if len(x) == 0:
        return to_torch(sparse.csr_array((0, 0), dtype=x.cpu().numpy().dtype), x.device)
    index = nearest_neighbours(x, k1)[1] if knn is None else knn[1]
    return to_torch(sparse.csr_array(encode(x, index, k1, k2, compat)), x.device)

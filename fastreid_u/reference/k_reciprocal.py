# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal encoding with the neighbour counts of the published clustering code.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, sections 3.2 to 3.4.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .knn import knn as nearest_neighbours
from .knn import pair_sq_dist


def k_reciprocal_sets(full: np.ndarray, half: np.ndarray) -> sparse.csr_array:
    """Expanded reciprocal neighbours of every row as a 0/1 matrix (N, N), columns ascending.

    ``full`` (N, k) and ``half`` (N, h) hold neighbour indices, self included. With R(i) the mutual neighbours in
    ``full`` and H(q) those in ``half``, row i is R(i) joined by every H(q), q in R(i), of which more than two thirds
    lie in R(i) already.
    """
    mutual, mutual_half = _mutual(full), _mutual(half)
    size = mutual_half.sum(axis=1)
    shared = (mutual @ mutual_half).multiply(mutual).tocsr()  # at (i, q): |H(q) & R(i)|
    shared.data = (3 * shared.data > 2 * size[shared.indices]).astype(np.int32)  # in integers, so 2/3 itself is out
    shared.eliminate_zeros()
    sets = (mutual + shared @ mutual_half).tocsr()
    sets.sort_indices()
    sets.data[:] = 1
    return sets


def _mutual(lists: np.ndarray) -> sparse.csr_array:
    n, k = lists.shape
    listed = sparse.csr_array((np.ones(n * k, np.int32), lists.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    return listed.multiply(listed.T).tocsr()


def expand_query(v: sparse.csr_array, lists: np.ndarray) -> sparse.csr_array:
    """Row i becomes the mean of the rows of ``v`` named in ``lists[i]``, added in list order in ``v``'s dtype."""
    n, k = lists.shape
    # scipy's product walks a row's entries as stored, and they stay unsorted here: rank order
    chosen = sparse.csr_array((np.ones(n * k, v.dtype), lists.ravel(), np.arange(0, n * k + 1, k)), shape=v.shape)
    mean = chosen @ v
    mean.data /= v.dtype.type(k)
    mean.sort_indices()
    return mean


def encode(x: Tensor, index: Tensor, k1: int, k2: int, compat: bool) -> sparse.csr_array:
    """The encoding as a scipy matrix in ``x``'s dtype; ``index`` (N, at least k1) ranks the neighbours."""
    n = len(x)
    k1, k2 = min(k1, n), min(k2, n)
    lists = index[:, :k1].cpu().numpy()
    half = int(np.around(k1 / 2)) + 1  # np.around rounds halves to even, as published: k1 = 25 gives 12 + 1
    sets = k_reciprocal_sets(lists, lists[:, :half])

    row = torch.from_numpy(np.repeat(np.arange(n), np.diff(sets.indptr))).to(x.device)
    column = torch.from_numpy(sets.indices.astype(np.int64)).to(x.device)
    if compat:  # the published weight, right for unit rows only: |x|^2 + |y|^2 taken as 2
        norm = x.double().square().sum(dim=1)
        sq_dist = pair_sq_dist(x, x, row, column) - norm[row] - norm[column] + 2
    else:
        sq_dist = pair_sq_dist(x, x, row, column)
    sq_dist = sq_dist.to(x.dtype).cpu().numpy()
    row = row.cpu().numpy()

    # softmax of -sq_dist over the set; the shift keeps far-off sets from underflowing
    lowest = np.full(n, np.inf, sq_dist.dtype)
    np.minimum.at(lowest, row, sq_dist)
    weight = np.exp(lowest[row] - sq_dist)
    total = np.zeros(n, weight.dtype)
    np.add.at(total, row, weight)
    v = sparse.csr_array((weight / total[row], sets.indices, sets.indptr), shape=(n, n))
    return v if k2 == 1 else expand_query(v, lists[:, :k2])


def to_torch(matrix: sparse.csr_array, device: torch.device) -> Tensor:
    """A scipy CSR matrix as ``torch.sparse_csr`` with int64 indices; explicit zeros stay."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)).to(device),
            torch.from_numpy(matrix.indices.astype(np.int64)).to(device),
            torch.from_numpy(matrix.data).to(device),
            matrix.shape,
            check_invariants=False,
        )


def working_dtype(x: Tensor) -> Tensor:
    """Half precision widens to float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@torch.no_grad()
def k_reciprocal_encoding(
    x: Tensor, k1: int = 30, k2: int = 6, *, knn: tuple[Tensor, Tensor] | None = None, compat: bool = False
) -> Tensor:
    """The soft membership matrix (N, N), ``torch.sparse_csr``, rows summing to 1.

    A row that misses itself in its own list (possible in a given ``knn``) may end with no members: it stays empty.
    """
    x = working_dtype(x)
    if len(x) == 0:
        return to_torch(sparse.csr_array((0, 0), dtype=x.cpu().numpy().dtype), x.device)
    index = nearest_neighbours(x, k1)[1] if knn is None else knn[1]
    return to_torch(encode(x, index, k1, k2, compat), x.device)

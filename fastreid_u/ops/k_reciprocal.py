# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal encoding: soft membership of each point in its expanded reciprocal neighbourhood."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_2d,
    require_features,
    require_integer,
    require_positive_int,
    require_same_device,
    require_same_length,
    require_values_in,
)
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops.knn import knn as nearest_neighbours
from fastreid_u.reference import k_reciprocal as reference


def k_reciprocal_encoding(
    x: Tensor,
    k1: int = 30,
    k2: int | None = None,
    *,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The sparse matrix V' whose rows the Jaccard distance compares.

    Row i weighs the mutual k1-nearest neighbours of i, joined by those of them whose own half lists agree (more than
    two thirds inside), with a softmax of minus the squared distance; then it is averaged over i's k2 nearest rows by
    (distance, index), i being one of them unless k2 copies of it precede it.

    Args:
        x: (N, D) floating point, any device; taken in float32.
        k1: neighbours examined per row, the row itself included. The half list has round-half-even(k1 / 2) + 1.
        k2: rows averaged in local query expansion, at most k1; 1 turns it off. None: 6, or k1 if that is less.
        knn: a ready ``(sq_dist, index)`` of :func:`fastreid_u.knn` on ``x``, at least k1 columns; saves the search.
        compat: weigh by 2 - 2 x.y, as most published code does, instead of the true squared distance. The two are
            the same for unit rows.
        backend: "auto", "numba" (a CPU, as many threads as ``torch.get_num_threads()``), "triton" (a GPU) or
            "reference"; anything but "auto" runs there or raises.

    Returns:
        ``torch.sparse_csr`` (N, N) float32 on ``x``'s device, columns ascending, rows summing to 1 (a row that a given
        ``knn`` leaves out of its own list may be empty). At most k1 (1 + k1 / 6) entries a row before the averaging.

    Raises:
        TypeError, ValueError: wrong type, shape or count, NaN or infinity; the message names argument, rule and value.

    Every backend follows the published float32 arithmetic here: distances are summed in float64 and rounded once,
    weights and all further sums are float32, over ascending columns in the softmax and in rank order in the averaging.
    The Jaccard ops compare integers instead, see :func:`jaccard_graph`. k1 and k2 beyond N, and k2 beyond k1, are
    clipped with one warning. Not differentiable.
    Zhong et al., CVPR 2017, sections 3.2 to 3.4, with the neighbour counts of the published clustering code.
    """
    op = "k_reciprocal_encoding"
    x = require_features(op, "x", x)
    k1, k2 = neighbour_counts(op, k1, k2, len(x))
    knn = neighbours(op, x, k1, knn)
    run = choose(op, x.device, backend, numba=_numba, triton=_triton, reference=reference.k_reciprocal_encoding)
    return run(x, k1, k2, knn=knn, compat=compat)


def _numba(x: Tensor, k1: int, k2: int, *, knn: tuple[Tensor, Tensor], compat: bool) -> Tensor:
    from fastreid_u.cpu import k_reciprocal as cpu

    if len(x) == 0:
        return sparse_rows(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    rows = cpu.k_reciprocal_encoding(
        x.contiguous().numpy(), index_array(knn, k1), k2, compat=compat, threads=torch.get_num_threads()
    )
    return sparse_rows(*rows)


def _triton(x: Tensor, k1: int, k2: int, *, knn: tuple[Tensor, Tensor], compat: bool) -> Tensor:
    from fastreid_u.kernels.k_reciprocal import k_reciprocal

    return sparse_rows(*k_reciprocal(x, knn[1], k1, k2, compat=compat, fixed=False)[:3])


def index_array(knn: tuple[Tensor, Tensor], k1: int) -> np.ndarray:
    """The first ``k1`` columns of the neighbour lists as the CPU kernels read them."""
    return np.ascontiguousarray(knn[1][:, :k1].numpy(), np.int32)


def sparse_rows(indptr: np.ndarray | Tensor, column: np.ndarray | Tensor, value: np.ndarray | Tensor) -> Tensor:
    """``torch.sparse_csr`` (N, N) with int64 indices; explicit zeros stay, and torch's notices stay inside."""
    n = len(indptr) - 1
    parts = [part if isinstance(part, Tensor) else torch.from_numpy(part) for part in (indptr, column, value)]
    parts[1] = parts[1].long()
    with warnings.catch_warnings():
        for notice in ("Sparse CSR tensor support is in beta", "Sparse invariant checks are implicitly disabled"):
            warnings.filterwarnings("ignore", notice, UserWarning)
        return torch.sparse_csr_tensor(*parts, (n, n), device=parts[2].device, check_invariants=False)


def neighbour_counts(op: str, k1: object, k2: object, rows: int, *, stacklevel: int = 3) -> tuple[int, int]:
    """Check ``k1`` and ``k2``, by default 6 or ``k1``; clip both to the number of rows, and ``k2`` to ``k1``, with one
    warning, ``stacklevel`` frames up."""
    k1 = require_positive_int(op, "k1", k1)
    k2 = min(6, k1) if k2 is None else require_positive_int(op, "k2", k2)
    if rows >= 2**31:  # rows are numbered in int32; what counts pairs and entries is int64 everywhere
        raise ValueError(f"{op}: x must have fewer than 2**31 rows, got {rows}")
    if 0 < rows < k1:
        text = f"{op}: k1={k1}, k2={k2} is more than the {rows} rows there are, clipped to them"
        warnings.warn(text, stacklevel=stacklevel)
    elif k2 > k1:
        warnings.warn(f"{op}: k2={k2} is more than the k1={k1} rows of a list, clipped to it", stacklevel=stacklevel)
    k1 = min(k1, rows) if rows else k1
    return k1, min(k2, k1)


def neighbours(
    op: str, x: Tensor, k1: int, knn: tuple[Tensor, Tensor] | None, hint: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The neighbour lists of ``x``: searched for, with a hint if there is one, or the given ones after a check."""
    if knn is None:
        return nearest_neighbours(x, k1, hint=hint) if len(x) else (x.new_zeros(0, k1), x.new_zeros(0, k1).long())
    if not isinstance(knn, (tuple, list)) or len(knn) != 2:
        raise TypeError(f"{op}: knn must be a pair (sq_dist, index), got {type(knn).__name__}")
    sq_dist = require_2d(op, "knn sq_dist", as_tensor(op, "knn sq_dist", knn[0]))
    index = require_integer(op, "knn index", require_2d(op, "knn index", as_tensor(op, "knn index", knn[1])))
    for name, part in (("knn sq_dist", sq_dist), ("knn index", index)):
        require_same_length(op, name, part, "x", x)
        require_same_device(op, name, part, "x", x)
    if index.shape[1] < k1 or sq_dist.shape != index.shape:
        raise ValueError(
            f"{op}: knn must hold at least k1={k1} columns in equal shapes, "
            f"got {tuple(sq_dist.shape)} and {tuple(index.shape)}"
        )
    return sq_dist, require_values_in(op, "knn index", index.long(), 0, len(x), always=True)

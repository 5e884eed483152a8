# SPDX-License-Identifier: Apache-2.0
"""A graph of distances in the one form that the compiled core reads, from whatever form it came in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastreid_u._checks import as_tensor, require_2d

_TORCH_SPARSE = (torch.sparse_csr, torch.sparse_csc, torch.sparse_coo)


@dataclass(frozen=True)
class DistanceGraph:
    """N x N distances, dense or as compressed sparse rows.

    Attributes:
        data: contiguous float32 or float64, (N, N) if dense, else (nnz,).
        indptr: (N + 1,) int64, or None if dense.
        indices: (nnz,) int32 or int64, or None if dense.
        n: number of points.
        dtype: what the distances were stored as.
        called: what messages call it: the op and the name of the argument.
    """

    data: Tensor
    indptr: Tensor | None
    indices: Tensor | None
    n: int
    dtype: torch.dtype
    called: str

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> DistanceGraph:
        """The same graph on ``device``."""
        if self.indptr is None:
            return replace(self, data=self.data.to(device))
        return replace(self, data=self.data.to(device), indptr=self.indptr.to(device), indices=self.indices.to(device))

    def sorted(self) -> DistanceGraph:
        """The same sparse graph with every row's columns ascending."""
        rows = torch.repeat_interleave(torch.arange(self.n, device=self.device), self.indptr.diff())
        by_column = torch.argsort(self.indices, stable=True)
        order = by_column[torch.argsort(rows[by_column], stable=True)]
        return replace(self, data=self.data[order], indices=self.indices[order])


def read_graph(op: str, graph: Any, name: str = "graph") -> DistanceGraph:
    """Take a graph apart without copying where types and layout already fit.

    Accepts ``torch.sparse_csr``, ``sparse_csc`` and ``sparse_coo``, anything with ``tocsr`` (every SciPy and CuPy
    sparse format), and dense matrices: torch, NumPy or ``__dlpack__``. Half precision is widened to float32, which is
    exact, and integers to float64. A pair that ``sparse_coo`` stores several times has their sum, as in SciPy.
    """
    called = f"{op}: {name}"
    if isinstance(graph, Tensor) and graph.layout in _TORCH_SPARSE:
        shape = tuple(graph.shape)
        parts = _compressed_rows(called, graph) if len(shape) == 2 else (None, None, graph)
    elif hasattr(graph, "tocsr"):
        rows = graph.tocsr()
        parts = tuple(as_tensor(op, name, part) for part in (rows.indptr, rows.indices, rows.data))
        shape = tuple(rows.shape)
    elif isinstance(graph, Tensor) and graph.layout != torch.strided:
        raise TypeError(
            f"{called} must be torch.sparse_csr, sparse_csc or sparse_coo, SciPy sparse or dense, got {graph.layout}"
        )
    else:
        dense = require_2d(op, name, as_tensor(op, name, graph))
        parts, shape = (None, None, dense), tuple(dense.shape)

    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{called} must be square, got shape {shape}")
    indptr, indices, data = parts
    dtype = data.dtype
    if dtype == torch.bool or dtype.is_complex:
        raise TypeError(f"{called} must hold real distances, got {dtype}")
    if dtype not in (torch.float32, torch.float64):
        data = data.to(torch.float32 if dtype.is_floating_point else torch.float64)
    data = data.detach().contiguous()
    if indptr is None:
        return DistanceGraph(data, None, None, shape[0], dtype, called)
    if len(indptr) != shape[0] + 1 or len(indices) != len(data):
        raise ValueError(
            f"{called} must have {shape[0] + 1} row pointers and one column for each value, "
            f"got {len(indptr)} pointers, {len(indices)} columns and {len(data)} values"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        indices = indices.to(torch.int64)
    return DistanceGraph(data, indptr.to(torch.int64).contiguous(), indices.contiguous(), shape[0], dtype, called)


def _compressed_rows(called: str, graph: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers, columns and values of a sparse torch matrix."""
    if graph.layout == torch.sparse_csr:
        return graph.crow_indices(), graph.col_indices(), graph.values()
    if graph.layout == torch.sparse_coo:
        graph = graph.detach().coalesce()
        (row, column), value = graph.indices(), graph.values()
    else:
        row, value = graph.row_indices().long(), graph.values()
        column = torch.repeat_interleave(torch.arange(graph.shape[1], device=row.device), graph.ccol_indices().diff())
        order = row.argsort(stable=True)
        row, column, value = row[order], column[order], value[order]
    rows = graph.shape[0]
    if len(row) and not (row[0] >= 0 and row[-1] < rows):  # they ascend
        raise ValueError(f"{called} must hold rows in [0, N), got {int(row[0])} to {int(row[-1])}")
    pointers = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
    pointers[1:] = row.bincount(minlength=rows).cumsum(0)
    return pointers, column, value

# SPDX-License-Identifier: Apache-2.0
"""Exact k nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    clip_count,
    require_2d,
    require_features,
    require_integer,
    require_positive_int,
    require_same_device,
    require_same_length,
    require_same_width,
    require_values_in,
)
from fastreid_u.ops import _cpu_products
from fastreid_u.ops._dispatch import choose
from fastreid_u.reference import knn as reference


def knn(
    x: Tensor,
    k: int,
    *,
    gallery: Tensor | None = None,
    approximate: Any = False,
    hint: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k nearest rows by squared Euclidean distance, exact unless ``approximate``.

    Args:
        x: (N, D) floating point, any device; taken in float32. Need not be of unit length.
        k: neighbours per row, the row itself included; more than there are rows is clipped with a warning.
        gallery: (M, D) rows to search; ``x`` itself if None.
        approximate: only with backend "faiss", for more rows than can all be compared. True builds an inverted file (4
            sqrt(M) lists at most, a sixteenth of them searched); or a ready faiss index, trained, that holds the
            searched rows as they are, in their order, with any metric and on any device. Neighbours may then be missed.
        hint: (N, h) integers, rows of the searched set that may be near, as last epoch's ``index``; -1 for none. Any
            rows will do: "numba" and "triton" measure them first, as a limit to the k-th distance, and the result is
            the same whatever they are. The other backends check it and search without it.
        backend: "auto", "numba" (a CPU, as many threads as ``torch.get_num_threads()``), "triton" (a GPU), "faiss"
            (never by "auto"; its own threads, on the host) or "reference"; anything but "auto" runs there or raises.

    Returns:
        ``(sq_dist, index)`` on ``x``'s device, (N, k) float32 and (N, k) int64. Without a gallery a row's own index
        comes first; the rest is ascending by (distance, index). Distances are sums of squared differences, so copies
        are exactly 0 apart, and ties, also at the cut-off, go to the lower index.

    Raises:
        TypeError: not floating point, or not a dense array; a hint that is not of integers.
        ValueError: wrong shape, k < 1, NaN or infinity (the message counts the rows and names the first); an index of
            other rows; a hint of rows that there are not.
        RuntimeError: the backend asked for is not available here.

    "faiss" names k + 8 candidates, which are measured and ordered as everywhere: the row itself first, ties by lower
    index. Exact, it is a flat index: a row whose k-th distance is nearer to the last candidate's than float32 sums can
    tell apart is searched again by another backend, which also completes rows for which an approximate index finds
    fewer than k.

    Rows of zeros are points like any other. Memory: 12 N k bytes for the result, and a block of rows against all
    others while it runs (32 MB, and a copy of ``x`` or less, on a CPU, 300 MB and a float16 copy of the gallery on a
    GPU, 32 MB a temporary in the reference); faiss keeps a copy of its own, and 12 N (k + 8). Never N x N. Not
    differentiable.
    """
    x = require_features("knn", "x", x)
    if gallery is not None:
        gallery = require_same_width("knn", "gallery", require_features("knn", "gallery", gallery), "x", x)
        require_same_device("knn", "gallery", gallery, "x", x)
    k = require_positive_int("knn", "k", k)
    k = clip_count("knn", "k", k, len(x if gallery is None else gallery))
    approximate = bool(approximate) if isinstance(approximate, np.bool_) else approximate
    hint = None if hint is None else require_hint("knn", hint, x, x if gallery is None else gallery)
    run = choose("knn", x.device, backend, numba=_numba, triton=_triton, faiss=_faiss, reference=reference.knn)
    if run is _faiss:
        return _faiss(x, k, gallery=gallery, approximate=approximate)
    if approximate is not False:
        raise ValueError(f"knn: approximate must be asked of backend 'faiss', got backend {backend!r}")
    return run(x, k, gallery=gallery, hint=hint) if run in (_numba, _triton) else run(x, k, gallery=gallery)


def require_hint(op: str, hint: object, x: Tensor, searched: Tensor) -> Tensor:
    """A row of integers for each of ``x``: rows of ``searched``, or -1."""
    hint = require_integer(op, "hint", require_2d(op, "hint", as_tensor(op, "hint", hint)))
    require_same_length(op, "hint", hint, "x", x)
    require_same_device(op, "hint", hint, "x", x)
    return require_values_in(op, "hint", hint.long(), -1, len(searched), always=True)


def own_first(sq_dist: Tensor, index: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours of ``row`` (n,) among all rows, in the order of a set that is searched for itself: the row first.

    If k copies of a lower index came before it, the last of them makes room.
    """
    row = row[:, None]
    order = (index != row).to(torch.int8).argsort(dim=1, stable=True)
    sq_dist, index = sq_dist.gather(1, order), index.gather(1, order)
    there = index[:, :1] == row
    sq_dist = torch.where(there, sq_dist, torch.cat([torch.zeros_like(sq_dist[:, :1]), sq_dist[:, :-1]], dim=1))
    return sq_dist, torch.where(there, index, torch.cat([row, index[:, :-1]], dim=1))


def _numba(x: Tensor, k: int, *, gallery: Tensor | None, hint: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Products of matrices by torch, the rest compiled."""
    from fastreid_u.cpu import knn as cpu

    found = cpu.knn(
        x.contiguous().numpy(),
        k,
        gallery=None if gallery is None else gallery.contiguous().numpy(),
        hint=None if hint is None else hint.contiguous().numpy(),
        threads=torch.get_num_threads(),
        product=_cpu_products.product,
        dtype=_cpu_products.product_dtype(),
        in_bfloat16=_cpu_products.in_bfloat16 if _cpu_products.has_bfloat16() else None,
    )
    return torch.from_numpy(found.sq_dist), torch.from_numpy(found.index)


def _faiss(x: Tensor, k: int, *, gallery: Tensor | None, approximate: Any) -> tuple[Tensor, Tensor]:
    """The neighbours that faiss can settle; the rows it leaves open are searched by the fastest exact backend."""
    from fastreid_u.ops import _faiss as faiss

    faiss.require_index("knn", approximate, *(x if gallery is None else gallery).shape)
    home, x, gallery = x.device, x.cpu(), None if gallery is None else gallery.cpu()
    sq_dist, index, open_rows = faiss.search(x, k, gallery=gallery, approximate=approximate)
    if len(open_rows):
        exact = choose("knn", x.device, "auto", numba=_numba, reference=reference.knn)
        again = exact(x[open_rows], k, gallery=x if gallery is None else gallery)
        sq_dist[open_rows], index[open_rows] = again if gallery is not None else own_first(*again, open_rows)
    return sq_dist.to(home), index.to(home)


def _triton(x: Tensor, k: int, *, gallery: Tensor | None, hint: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from fastreid_u.kernels.knn import knn as kernel

    return kernel(x, k, gallery, hint)

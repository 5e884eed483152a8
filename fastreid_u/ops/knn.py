# SPDX-License-Identifier: Apache-2.0
"""Exact k nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_u import _env
from fastreid_u._checks import (
    clip_count,
    require_choice,
    require_features,
    require_positive_int,
    require_same_device,
    require_same_width,
)
from fastreid_u.ops._dispatch import choose
from fastreid_u.reference import knn as reference


def knn(
    x: Tensor,
    k: int,
    *,
    gallery: Tensor | None = None,
    precision: str = "fp32",
    approximate: Any = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k nearest rows by squared Euclidean distance, exact unless ``approximate``.

    Args:
        x: (N, D) floating point, any device; taken in float32. Need not be of unit length.
        k: neighbours per row, the row itself included; more than there are rows is clipped with a warning.
        gallery: (M, D) rows to search; ``x`` itself if None.
        precision: "fp32", "tf32" or "bf16", how coarsely a GPU may look for candidates. The result is measured exactly
            either way; "triton" looks in float16 with proven bounds, whatever is asked for.
        approximate: only with backend "faiss", for more rows than can all be compared. True builds an inverted file (4
            sqrt(M) lists at most, a sixteenth of them searched); or a ready faiss index, trained, that holds the
            searched rows as they are, in their order, with any metric and on any device. Neighbours may then be missed.
        backend: "auto", "numba" (a CPU, as many threads as ``torch.get_num_threads()``), "triton" (a GPU), "faiss"
            (never by "auto"; its own threads, on the host) or "reference"; anything but "auto" runs there or raises.

    Returns:
        ``(sq_dist, index)`` on ``x``'s device, (N, k) float32 and (N, k) int64. Without a gallery a row's own index
        comes first; the rest is ascending by (distance, index). Distances are sums of squared differences, so copies
        are exactly 0 apart, and ties, also at the cut-off, go to the lower index.

    Raises:
        TypeError: not floating point, or not a dense array.
        ValueError: wrong shape, k < 1, NaN or infinity (the message counts the rows and names the first); an index of
            other rows.
        RuntimeError: the backend asked for is not available here.

    "faiss" names k + 8 candidates, which are measured and ordered as everywhere: the row itself first, ties by lower
    index. Exact, it is a flat index: a row whose k-th distance is nearer to the last candidate's than float32 sums can
    tell apart is searched again by another backend, which also completes rows for which an approximate index finds
    fewer than k.

    Rows of zeros are points like any other. Memory: 12 N k bytes for the result, and a block of rows against all
    others while it runs (64 MB and a copy of ``x`` on a CPU, 300 MB and a float16 copy of the gallery on a GPU, 32 MB a
    temporary in the reference); faiss keeps a copy of its own, and 12 N (k + 8). Never N x N. Not differentiable.
    """
    x = require_features("knn", "x", x)
    if gallery is not None:
        gallery = require_same_width("knn", "gallery", require_features("knn", "gallery", gallery), "x", x)
        require_same_device("knn", "gallery", gallery, "x", x)
    k = require_positive_int("knn", "k", k)
    k = clip_count("knn", "k", k, len(x if gallery is None else gallery))
    require_choice("knn", "precision", precision, ("fp32", "tf32", "bf16"))
    numba, triton, faiss = _env.numba(), _env.triton(), _env.faiss()
    table = {
        "numba": _numba if numba.present else numba.detail,
        "triton": _triton if triton.present else triton.detail,
        "faiss": _faiss if faiss.present and numba.present else (faiss if numba.present else numba).detail,
        "reference": reference.knn,
    }
    run = choose("knn", x.device, backend, table)
    if isinstance(approximate, (bool, np.bool_)) and not approximate:
        return run(x, k, gallery=gallery, precision=precision)
    if run is not _faiss:
        raise ValueError(f"knn: approximate must be asked of backend 'faiss', got backend {backend!r}")
    return _faiss(x, k, gallery=gallery, precision=precision, approximate=approximate)


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


def _numba(x: Tensor, k: int, *, gallery: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """Products of matrices by torch, the rest compiled; ``precision`` is for GPUs."""
    from fastreid_u.cpu import knn as cpu

    # a process-wide setting may let float32 products round their factors, which no bound of ours covers
    try:
        rounds = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through torch.backends' newer names, which that function does not read
        rounds = True
    found = cpu.knn(
        x.contiguous().numpy(),
        k,
        gallery=None if gallery is None else gallery.contiguous().numpy(),
        threads=torch.get_num_threads(),
        product=lambda a, b, out: torch.mm(*map(torch.from_numpy, (a, b)), out=torch.from_numpy(out)),
        dtype=np.float64 if rounds else np.float32,
    )
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _faiss(
    x: Tensor, k: int, *, gallery: Tensor | None, precision: str, approximate: Any = False
) -> tuple[Tensor, Tensor]:
    from fastreid_u.ops import _faiss as faiss

    faiss.require_index("knn", approximate, *(x if gallery is None else gallery).shape)
    return faiss.knn(x, k, gallery=gallery, approximate=approximate)


def _triton(x: Tensor, k: int, *, gallery: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    from fastreid_u.kernels.knn import knn as kernel

    return kernel(x, k, gallery)

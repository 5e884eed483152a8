# SPDX-License-Identifier: Apache-2.0
"""Neighbours by faiss: it names candidates, our rules decide between them, and the rows left open are named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SPARE = 8  # candidates beyond k, so that rounding at the cut-off seldom leaves a row in doubt


def require_index(op: str, approximate: object, rows: int, width: int) -> None:
    """``approximate`` is a bool, or a faiss index over as many rows of that width."""
    if isinstance(approximate, bool):
        return
    if not all(hasattr(approximate, name) for name in ("search", "ntotal", "d")):
        raise TypeError(f"{op}: approximate must be a bool or a faiss index, got {type(approximate).__name__}")
    if (approximate.ntotal, approximate.d) != (rows, width):
        raise ValueError(
            f"{op}: approximate must index the {rows} rows of width {width} that are searched, in their order, "
            f"got {approximate.ntotal} rows of width {approximate.d}"
        )


def search(x: Tensor, k: int, *, gallery: Tensor | None, approximate: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(sq_dist, index, open_rows)``: the neighbours as ``fastreid_u.knn`` orders them, and the rows without them.

    Args:
        x, gallery: on a CPU.
        approximate: False, True or a faiss index, checked by :func:`require_index`.

    A row is open if faiss named fewer than k candidates or, with ``approximate`` False, if its rounding may have hidden
    a nearer one.
    """
    from fastreid_u.cpu import knn as cpu

    if len(x) == 0 or k == 0:
        return x.new_zeros(len(x), k), x.new_zeros(len(x), k).long(), torch.empty(0, dtype=torch.int64, device="cpu")
    plain = x.contiguous().numpy(), None if gallery is None else gallery.contiguous().numpy()
    most = min(k + _SPARE, len(x if gallery is None else gallery))
    if approximate is False:
        candidates, limit = _exact(*plain, most)
    else:
        candidates, limit = _approximate(*plain, most, approximate), np.full(len(x), np.inf)
    sq_dist, index, found = cpu.rank_candidates(
        plain[0], candidates, k, gallery=plain[1], threads=torch.get_num_threads()
    )
    # a row that was not named is at least at the limit; distances that round to one float32 are a tie, which it may win
    reach = sq_dist[:, -1].astype(np.float64) * (1 + 2.0**-21)
    open_rows = np.flatnonzero((found < k) | (reach >= limit))
    return torch.from_numpy(sq_dist), torch.from_numpy(index), torch.from_numpy(open_rows)


def _exact(x: np.ndarray, gallery: np.ndarray | None, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of a flat index, and for each row what all others are at least away."""
    import faiss

    from fastreid_u.cpu import knn as cpu

    rows = cpu.centre(x, gallery)
    flat = faiss.IndexFlatL2(x.shape[1])
    flat.add(rows.y)
    scaled, candidates = flat.search(rows.x, most)
    if most == len(rows.y):
        return candidates, np.full(len(x), np.inf)
    bound, least = cpu.rounding(x.shape[1])  # twice: faiss sums the squared lengths in float32 as well
    doubt = 2 * (bound * (rows.norm_x + rows.norm_y.max()) + least)
    return candidates, (scaled[:, -1].astype(np.float64) - doubt) / rows.scale**2


def _approximate(x: np.ndarray, gallery: np.ndarray | None, most: int, index: Any) -> np.ndarray:
    import faiss

    from fastreid_u.cpu import knn as cpu

    if index is not True:
        candidates = index.search(x, most)[1]
        if candidates.max(initial=-1) >= index.ntotal:
            raise ValueError(f"knn: approximate must number rows from 0, got row {candidates.max()} of {index.ntotal}")
        return candidates
    rows = cpu.centre(x, gallery)
    # k-means wants 39 points a list or complains; a sixteenth of the lists is searched
    lists = max(1, min(int(4 * math.sqrt(len(rows.y))), len(rows.y) // 39))
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatL2(x.shape[1]), x.shape[1], lists)
    inverted.nprobe = max(1, lists // 16)
    inverted.train(rows.y)
    inverted.add(rows.y)
    return inverted.search(rows.x, most)[1]

# SPDX-License-Identifier: Apache-2.0
"""Exact k nearest rows: tensor cores look for candidates with proven bounds, float64 measures them (Triton, cuBLAS).

Stands alone: needs torch and triton, nothing else; copy this folder to use it elsewhere.
Oracle: fastreid_u/reference/knn.py.

There are two ways, and a sample decides which one a search goes (``plan.py``). Both name every row that can be among
the first k, prove it, and measure what they name.

* The plain way multiplies whole rows (``plain.py``): 2 N M D operations. It is right for small sets and for a flat
  spectrum, where no few directions tell rows apart.
* The cascade multiplies rows of 64, 128 or 256 numbers (``short_rows.py``, with the proof; ``cascade.py``). The k-th
  distance of a hint, or of a guess, is the limit. Trained features have such a spectrum, and then an eighth or less of
  the operations is left.

Rows whose buffer of candidates overflowed go on from the cascade to the plain way, and from there (more copies of a
point than it holds, or rows so close together that float16 cannot tell them apart) are measured against everything.

Memory: the result; 2 M D bytes for the float16 gallery of the plain way, 2 M R of the cascade; and 300 MB of blocks at
k = 30 and D = 2048. Never N x M.
"""

import torch

from . import cascade, plain
from .measure import against_all
from .plan import choose

__all__ = ["knn"]


def knn(
    x: torch.Tensor, k: int, gallery: torch.Tensor | None = None, hint: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` rows of ``gallery`` (or of ``x`` itself) nearest to each row of ``x``.

    Args:
        x: (N, D) float32, finite.
        k: at least 1; beyond the rows searched clipped.
        gallery: (M, D) float32 or None.
        hint: (N, h) integers or None: rows of the gallery that may be near, last epoch's neighbours for instance. The
            result does not depend on it. Numbers that name no row, or one twice, count for nothing; fewer than k
            different ones are no hint.

    Returns:
        ``(sq_dist, index)``, (N, k) float32 and (N, k) int64. Without a gallery a row's own index comes first, the
        rest ascends by (distance, index). Distances are summed in float64 and rounded once.
    """
    y = x if gallery is None else gallery
    if x.dtype != torch.float32 or y.dtype != torch.float32:
        raise TypeError(f"knn: want x and gallery float32, got {x.dtype} and {y.dtype}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"knn: x and gallery must be (N, D) and (M, D) with D > 0, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if hint is not None and (hint.dtype not in _INTEGERS or hint.ndim != 2 or len(hint) != len(x)):
        raise ValueError(f"knn: hint must be ({len(x)}, h) int32 or int64, got {tuple(hint.shape)} {hint.dtype}")
    n, k = len(x), min(k, len(y))
    sq_dist = torch.empty(n, k, dtype=torch.float32, device=x.device)
    index = torch.empty(n, k, dtype=torch.int64, device=x.device)
    if n == 0 or k == 0:
        return sq_dist, index

    alone, x = gallery is None, x.contiguous()
    y = x if alone else y.contiguous()
    if hint is not None and hint.shape[1] < k:
        hint = None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rows, plan = None, choose(x, y, k, hint)
        if plan is not None:
            rows = cascade.search(x, y, plan.short, alone, hint if plan.hinted else None, sq_dist, index)
        if rows is None or len(rows):
            against_all(x, y, plain.search(x, y, rows, alone, sq_dist, index), alone, sq_dist, index)
    return sq_dist, index


_INTEGERS = (torch.int32, torch.int64)

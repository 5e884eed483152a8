# SPDX-License-Identifier: Apache-2.0
"""Overlaps of query rows with every gallery row, by inverted lists (plain torch, on any device).

Stands alone: needs torch, nothing else; copy this file to use it elsewhere.
Method: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, section 3.3.
Oracle: fastreid_u/reference/rerank.py.

The rows are integers, as ``k_reciprocal`` in the file of that name makes them, so atomics may add them up in any order.
A query meets about 10,000 (column, gallery row) pairs; each costs one atomic and some 60 bytes of traffic, which is
little beside the product of matrices that the original distances take. That is why there is no kernel of its own here.
"""

import torch

_PAIRS = 1 << 22  # met at a time: 32 MB an int64 array


def invert(
    crow: torch.Tensor, col: torch.Tensor, mass: torch.Tensor, num_query: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each column of a CSR matrix (n, n) the gallery rows, those from ``num_query`` on, that hold it.

    Args:
        crow, col, mass: int64, int32 and int32.

    Returns:
        ``(start, holder, mass)``: (n + 1,) int64, the first entry of each column's list; int64, the place of a row in
        the gallery; int32, the weight of the column in that row.
    """
    n = len(crow) - 1
    first = int(crow[num_query])
    row = torch.repeat_interleave(torch.arange(n - num_query, device=col.device), crow[num_query:].diff())
    column = col[first:]
    order = column.argsort(stable=True)
    return _starts(column.bincount(minlength=n)), row[order], mass[first:][order]


def overlaps(
    crow: torch.Tensor,
    col: torch.Tensor,
    mass: torch.Tensor,
    inverted: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    first: int,
    last: int,
    gallery: int,
) -> torch.Tensor:
    """(last - first, gallery) int32: the sums of minima of rows ``first`` to ``last`` and of every gallery row.

    ``inverted`` is what :func:`invert` makes of the same matrix.
    """
    start, holder, held = inverted
    out = torch.zeros((last - first) * gallery, dtype=torch.int32, device=col.device)
    begin, end = crow[[first, last]].tolist()
    column, own = col[begin:end], mass[begin:end]
    base = torch.repeat_interleave(
        torch.arange(last - first, device=col.device) * gallery, crow[first : last + 1].diff(), output_size=end - begin
    )
    length = start.diff()[column]
    for low, high, pairs in _runs(length):
        entry = torch.repeat_interleave(torch.arange(low, high, device=col.device), length[low:high], output_size=pairs)
        before = _starts(length[low:high])[:-1]
        place = torch.arange(pairs, device=col.device) + (start[column[low:high]] - before)[entry - low]
        out.index_add_(0, base[entry] + holder[place], torch.minimum(own[entry], held[place]))
    return out.view(last - first, gallery)


def _runs(length):
    """Cut entries into runs that meet at most ``_PAIRS`` rows, or of one entry: (low, high, rows met)."""
    upto = length.cumsum(0).cpu()
    low = 0
    while low < len(upto):
        done = int(upto[low - 1]) if low else 0
        high = max(low + 1, int(torch.searchsorted(upto, done + _PAIRS, right=True)))
        yield low, high, int(upto[high - 1]) - done
        low = high


def _starts(counts):
    """Counts to offsets: (n,) to (n + 1,) int64."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))

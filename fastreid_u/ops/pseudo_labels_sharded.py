# SPDX-License-Identifier: Apache-2.0
"""The label step shared out over the ranks of torch.distributed."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastreid_u import _env
from fastreid_u._checks import one_or_more, require_features, require_in_range, require_positive_int
from fastreid_u.ops.k_reciprocal import index_array, neighbour_counts, neighbours
from fastreid_u.ops.knn import knn as nearest_neighbours
from fastreid_u.ops.knn import own_first
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.ranks import Ranks, bits_of

_OP = "pseudo_labels"


def pseudo_labels_sharded(
    x: Tensor,
    *,
    eps: float | Sequence[float] = 0.6,
    min_samples: int = 4,
    k1: int = 30,
    k2: int = 6,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
    group: object = "world",
) -> Tensor:
    """:func:`fastreid_u.pseudo_labels`, the same labels on every rank and for any number of ranks.

    Every rank calls it with the same arguments and all N rows. Neighbours are searched for a share of the rows by each
    rank. Then, for features on a CPU, encoding, measuring and linking are shared as well and the forests of linked
    cores merged; on a GPU, where all that follows the search takes less time than sending it around, every rank does
    it for itself and the labels of the first count.

    Args:
        x: (N, D) floating point features, the same bits on every rank; CPU, or each rank's own GPU.
        eps, min_samples, k1, k2, knn, compat: as in :func:`fastreid_u.pseudo_labels`; a ready ``knn`` is of all rows.
        group: a process group that this process is in, or "world". With NCCL the current CUDA device is used.

    Returns:
        (N,) int64 on ``x``'s device, or (len(eps), N): bit for bit what ``pseudo_labels`` gives.

    Raises:
        TypeError, ValueError: as there; also if ranks were not given the same. A fault on one rank raises on all of
            them, at the first exchange.
        RuntimeError: torch.distributed is not initialised.

    What is divided goes by rows where rows cost the same, else by the entries that are to be walked, counted before;
    no rank works while all others wait. Memory of a rank beside ``x``, with m entries in the encoding (50 to 100 a
    row), R ranks and blocks of scores as in ``knn``: 4 N k1 for the lists; 9 N k1 / R and V whole while rows are
    encoded; 16 m while they are exchanged, as much while they are indexed; 4 N R while forests are merged. One rank
    alone needs no more than ``pseudo_labels``. Below some 50,000 rows sharing saves less than it costs.
    """
    ranks = Ranks(_OP, group)
    error, several, given, seen = None, False, None, [0] * 16
    try:
        eps, several = one_or_more(_OP, "eps", eps)
        given = _checked(x, eps, min_samples, k1, k2, knn)
        seen = _seen(*given, compat)
    except (TypeError, ValueError) as fault:
        error = fault
    ranks.agree(error, seen)
    x, radii, min_samples, k1, k2, knn = given

    if len(x) == 0:
        labels = torch.empty(len(radii), 0, dtype=torch.int64, device=x.device)
    else:
        lists = _lists(x, k1, ranks) if knn is None else index_array((None, knn[1].cpu()), k1)
        if x.device.type == "cpu" and _env.numba().present:
            labels = _shared(x, lists, radii, min_samples, k2, compat, ranks)
        else:
            labels = _repeated(x, lists, radii, min_samples, k2, compat, ranks)
    return labels if several else labels[0]


def _checked(x, eps, min_samples, k1, k2, knn):
    x = require_features(_OP, "x", x)
    radii = [require_in_range(_OP, "eps", e, 0, 1, open_low=True, open_high=True) for e in eps]
    min_samples = require_positive_int(_OP, "min_samples", min_samples)
    k1, k2 = neighbour_counts(_OP, k1, k2, len(x))
    return x, radii, min_samples, k1, k2, None if knn is None else neighbours(_OP, x, k1, knn)


def _seen(x, radii, min_samples, k1, k2, knn, compat) -> list[int]:
    """Sixteen numbers that differ if the arguments do."""
    eps = torch.tensor([struct.unpack("<q", struct.pack("<d", e)) for e in radii])
    lists = torch.zeros(0, 0, dtype=torch.int64) if knn is None else knn[1][:, :k1]
    return [min_samples, k1, k2, bool(compat), *bits_of(x), *bits_of(eps), *bits_of(lists)]


def _lists(x: Tensor, k1: int, ranks: Ranks) -> np.ndarray:
    """(N, k1) int32 neighbours of all rows; each rank searches for its own, the row itself first as in ``knn``."""
    begin, end = (len(x) * r // ranks.world for r in (ranks.rank, ranks.rank + 1))
    found = nearest_neighbours(x[begin:end], k1, gallery=x)
    found = own_first(*found, torch.arange(begin, end, device=x.device))[1]
    return ranks.gather(found.int().cpu().numpy())


def _shared(x, lists, radii, min_samples, k2, compat, ranks) -> Tensor:
    from fastreid_u.cpu import pseudo_labels_sharded as cpu

    options = {"compat": compat, "threads": torch.get_num_threads()}
    return torch.from_numpy(cpu.pseudo_labels(x.contiguous().numpy(), lists, k2, radii, min_samples, ranks, **options))


def _repeated(x, lists, radii, min_samples, k2, compat, ranks) -> Tensor:
    index = torch.from_numpy(lists).long().to(x.device)
    knn = (x.new_zeros(1, 1).expand(index.shape), index)  # labels read no distances
    encoding = {"k1": lists.shape[1], "k2": k2, "knn": knn, "compat": compat}
    return ranks.from_first(pseudo_labels(x, eps=radii, min_samples=min_samples, **encoding))

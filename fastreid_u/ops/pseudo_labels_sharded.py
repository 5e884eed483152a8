# SPDX-License-Identifier: Apache-2.0
"""What the ranks of torch.distributed share of ``pseudo_labels``; the labels are those of one process, bit for bit.

Every rank calls with the same arguments and all N rows (the same bits, on a CPU or on its own GPU). Neighbours are
searched for a share of the rows by each rank. Then, for features on a CPU, encoding, measuring and linking are shared
as well and the forests of linked cores merged; on a GPU, where all that follows the search takes less time than sending
it around, every rank does it for itself and the labels of the first count.

What is divided goes by rows where rows cost the same, else by the entries that are to be walked, counted before; no
rank works while all others wait. Memory of a rank beside ``x``, with m entries in the encoding (50 to 100 a row), R
ranks and blocks of scores as in ``knn``: 4 N k1 for the lists; 9 N k1 / R and V whole while rows are encoded; 16 m
while they are exchanged, as much while they are indexed; 4 N R while forests are merged. One rank alone needs no more
than a call without a group. Below some 50,000 rows sharing saves less than it costs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastreid_u.ops.k_reciprocal import index_array
from fastreid_u.ops.knn import knn as nearest_neighbours
from fastreid_u.ops.knn import own_first
from fastreid_u.ranks import FAULTS, Ranks, bits_of


class LabelStep(NamedTuple):
    """The arguments of ``pseudo_labels``, checked: what all ranks have to be given alike.

    Attributes:
        x, min_samples, k1, k2, compat: as there.
        eps: one or more radii.
        knn: the neighbours of all rows, or None if they are yet to be searched for.
    """

    x: Tensor
    eps: list[float]
    min_samples: int
    k1: int
    k2: int
    knn: tuple[Tensor, Tensor] | None
    compat: bool


def agreed(check: Callable[[], tuple[LabelStep, bool, Tensor | None]], ranks: Ranks) -> tuple:
    """What ``check`` returns, if it raises on no rank and returns the same on all but for the hint.

    Raises:
        Exception: on every rank, at this first exchange.
    """
    found, error, seen = None, None, [0] * 17
    try:
        found = check()
        seen = _seen(*found[:2])
    except FAULTS as fault:  # raised again as soon as the other ranks have heard of it
        error = fault
    ranks.agree(error, seen)
    return found


def _seen(step: LabelStep, several: bool) -> list[int]:
    """Seventeen numbers that differ if the arguments do."""
    eps = torch.tensor([struct.unpack("<q", struct.pack("<d", e)) for e in step.eps], device="cpu")
    lists = step.x.new_zeros(0, 0, dtype=torch.int64) if step.knn is None else step.knn[1][:, : step.k1]
    settings = [several, step.min_samples, step.k1, step.k2, bool(step.compat)]
    return [*settings, *bits_of(step.x), *bits_of(eps), *bits_of(lists)]


def share_search(step: LabelStep, ranks: Ranks, hint: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Neighbours of all rows as ``knn`` lists them, each rank searching for its own; the distances, unread, are 0."""
    x = step.x
    begin, end = (len(x) * r // ranks.world for r in (ranks.rank, ranks.rank + 1))
    found = nearest_neighbours(x[begin:end], step.k1, gallery=x, hint=None if hint is None else hint[begin:end])
    found = own_first(*found, torch.arange(begin, end, device=x.device))[1]
    index = torch.from_numpy(ranks.gather(found.int().cpu().numpy())).long().to(x.device)
    return x.new_zeros(1, 1).expand(index.shape), index


def share_clustering(step: LabelStep, ranks: Ranks) -> Tensor:
    """(len(eps), N) labels of features on a CPU, whose neighbours are known."""
    from fastreid_u.cpu import pseudo_labels_sharded as cpu

    x, lists = step.x.contiguous().numpy(), index_array(step.knn, step.k1)
    options = {"compat": step.compat, "threads": torch.get_num_threads()}
    return torch.from_numpy(cpu.pseudo_labels(x, lists, step.k2, step.eps, step.min_samples, ranks, **options))

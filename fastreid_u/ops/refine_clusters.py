# SPDX-License-Identifier: Apache-2.0
"""CACL's refinement: take a cluster apart where a tighter clustering does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastreid_u._checks import (
    require_choice,
    require_features,
    require_positive,
    require_same_device,
    require_same_length,
)
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops._distance_graph import DistanceGraph, read_graph
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.k_reciprocal import index_array, neighbour_counts, neighbours
from fastreid_u.ops.label_classes import (
    move_out,
    own_classes,
    require_labels,
    shared_sizes,
    sizes,
    without_singletons,
)
from fastreid_u.reference import refine_clusters as reference

_OP = "refine_clusters"
_UNIT = 2**30  # distances are added as integers, so that no sum depends on its order


def refine_clusters(
    x: Tensor | None,
    labels: Tensor,
    labels_tight: Tensor,
    *,
    rule: str = "official",
    ratio: float = 1.0,
    k1: int = 30,
    k2: int | None = None,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
    graph: Any = None,
    singletons: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Send points of clusters that a tighter clustering splits into classes of their own, as CACL does.

    A tight part is the points of one label in ``labels_tight``. J is the Jaccard distance, every point at 0 from
    itself. A point stays in its cluster C of n points if ratio * (score of its part) <= (score of C):

    * "official", as coded: C scores sum J_ij over C x C, divided by n^2. The part scores the sum over its points i of
      (sum of J_ij over the k_i points j that share with i one of the two labels and not the other) / k_i^2. That grows
      with the part, so the main part of a split cluster tends to be dissolved and stragglers to stay.
    * "mean_to_cluster", as the paper's text reads: the mean distance of the part's points to the other points of C,
      against the mean distance between points of C; a part that is its cluster stays. Stragglers leave.
    * "none": no point moves.

    Args:
        x: (N, D) floating point features, any device. None with ``graph``.
        labels, labels_tight: (N,) integers on the same device, -1 for noise, which is a class of its own for each
            point; usually ``pseudo_labels(x, eps=[0.6, 0.58])``.
        rule: "official", "mean_to_cluster" or "none".
        ratio: positive; more dissolves more.
        k1, k2, knn, compat: as in :func:`fastreid_u.jaccard_graph`; not used with ``graph``.
        graph: ready (N, N) distances in [0, 1], of any form that :func:`fastreid_u.dbscan` takes: dense, or sparse and
            complete up to 1, that is ``jaccard_graph(x, radius=1.0)``, where what is not stored is at 1.
        singletons: True numbers as published: noise takes new classes after the clusters, points that leave take new
            ones after those, both in the order of their index. False gives -1 to every point alone in its class,
            clusters 0 .. C - 1 in their old order.
        backend: "auto", "numba" (a CPU), "triton" (a GPU: its graph at radius 1) or "reference" (N x N);
            anything but "auto" runs there or raises. Not used with ``graph``.

    Returns:
        (N,) int64 on the device of ``labels``.

    Raises:
        TypeError, ValueError: wrong type, shape, length, device or choice; NaN; distances outside [0, 1].

    Only clusters that are split are measured. "numba" walks their pairs over the encoding and stores none: time grows
    with the sum of n^2, memory is the encoding and 4 N bytes for each thread. "triton" and ``graph`` read the entries
    of a sparse graph below 1, some thousand a row. Sums are integers of 2^-30, the same in any order. Never N x N
    unless ``graph`` is. Li et al., "Cluster-guided Asymmetric Contrastive Learning", IEEE TIP 2022.
    """
    labels, tight = require_labels(_OP, "labels", labels), require_labels(_OP, "labels_tight", labels_tight)
    require_same_length(_OP, "labels_tight", tight, "labels", labels)
    require_same_device(_OP, "labels_tight", tight, "labels", labels)
    require_choice(_OP, "rule", rule, ("official", "mean_to_cluster", "none"))
    ratio = require_positive(_OP, "ratio", ratio)
    if (x is None) == (graph is None):
        raise ValueError(f"{_OP}: x or graph must be given, and not both, got {'neither' if x is None else 'both'}")
    if graph is None:
        x = require_features(_OP, "x", x)
        require_same_length(_OP, "labels", labels, "x", x)
        require_same_device(_OP, "labels", labels, "x", x)
        runs = {"numba": _numba, "triton": _triton, "reference": reference.refine_clusters}
        run = choose(_OP, x.device, backend, **runs)
        k1, k2 = neighbour_counts(_OP, k1, k2, len(x))
        encoding = {"k1": k1, "k2": k2, "knn": neighbours(_OP, x, k1, knn), "compat": compat}
        if run is reference.refine_clusters:
            return run(x, labels, tight, rule=rule, ratio=ratio, singletons=singletons, **encoding)
    else:
        graph = _distances(graph, labels)

    labels, tight = own_classes(labels), own_classes(tight)
    wanted = _wanted(labels, tight, rule)
    if len(wanted):
        if graph is None:
            sums = run(x, labels, tight, wanted, **encoding)
        else:
            sums = _sums_on_graph(graph, labels, tight)
        part, cluster = _scores(labels, tight, *sums, rule)
        moved = torch.zeros_like(labels, dtype=torch.bool)
        moved[wanted] = (ratio * part > cluster)[wanted]
        labels = move_out(labels, moved)
    return labels if singletons else without_singletons(labels)


def _wanted(labels: Tensor, tight: Tensor, rule: str) -> Tensor:
    """Rows that are asked about: all of the clusters that come in parts, and of the parts that reach over clusters.

    The others are in a part that is their cluster, which stays.
    """
    if rule == "none" or len(labels) == 0:
        return labels.new_empty(0)
    both = shared_sizes(labels, tight)
    split = sizes(labels) != both
    if rule == "official":
        split |= sizes(tight) != both
    return split.nonzero().flatten()


def _scores(labels: Tensor, tight: Tensor, inside: Tensor, changed: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """(N,) float64: what each point's part scores, and what its cluster does."""
    n, both = sizes(labels), shared_sizes(labels, tight)
    spread = _total(labels, inside).double() / _UNIT
    if rule == "official":
        count = (n - both) + (sizes(tight) - both)
        # floating point, but added in the order of the index, which a sort by label keeps
        return _total(tight, changed.double() / _UNIT / count.clamp(min=1) ** 2), spread / n**2
    others = (n - 1).clamp(min=1)
    cell = (labels * (tight.max() + 1) + tight).unique(return_inverse=True)[1]
    return _total(cell, inside).double() / _UNIT / (both * others), spread / (n * others)


def _total(labels: Tensor, value: Tensor) -> Tensor:
    """(N,) the sum of ``value`` over each point's class."""
    if value.dtype == torch.int64:
        return value.new_zeros(int(labels.max()) + 1).index_add_(0, labels, value)[labels]
    order = labels.argsort(stable=True)
    return torch.segment_reduce(value[order], "sum", lengths=labels.bincount())[labels]


def _numba(x: Tensor, labels: Tensor, tight: Tensor, wanted: Tensor, *, k1: int, k2: int, knn, compat: bool):
    from fastreid_u.cpu import refine_clusters as cpu

    arrays = labels.numpy(), tight.numpy(), wanted.numpy()
    lists, threads = index_array(knn, k1), torch.get_num_threads()
    found = cpu.sums_within(x.contiguous().numpy(), lists, k2, *arrays, compat=compat, threads=threads)
    return tuple(torch.from_numpy(each) for each in found)


def _triton(x: Tensor, labels: Tensor, tight: Tensor, wanted: Tensor, **encoding: object) -> tuple[Tensor, Tensor]:
    graph = jaccard_graph(x, radius=1.0, backend="triton", **encoding)
    return _sums_on_graph(read_graph(_OP, graph), labels, tight)


def _sums_on_graph(graph: DistanceGraph, labels: Tensor, tight: Tensor) -> tuple[Tensor, Tensor]:
    """As the CPU kernel sums them: each point's distances to the rest of its cluster, and to the points that ``tight``
    adds to it or takes from it."""
    inside, changed, absent = torch.zeros_like(labels), torch.zeros_like(labels), 0
    if graph.indptr is not None:  # start from all at 1, where an entry that is not stored is
        absent = _UNIT
        inside += absent * (sizes(labels) - 1)
        changed += absent * (sizes(labels) + sizes(tight) - 2 * shared_sizes(labels, tight))
    for row, column, distance in _entries(graph):
        same = labels[row] == labels[column]
        units = (distance.double() * _UNIT).round().long() - absent
        for total, member in ((inside, same & (row != column)), (changed, same != (tight[row] == tight[column]))):
            total.index_add_(0, row[member], units[member])
    return inside, changed


def _entries(graph: DistanceGraph) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, columns and values of the stored entries, some millions at a time."""
    step = 2**22
    if graph.indptr is None:
        rows = max(1, step // max(1, graph.n))
        for begin in range(0, graph.n, rows):
            block = graph.data[begin : begin + rows]
            row = torch.arange(begin, begin + len(block), device=block.device).repeat_interleave(graph.n)
            yield row, torch.arange(graph.n, device=block.device).repeat(len(block)), block.flatten()
        return
    for begin in range(0, len(graph.data), step):
        part = slice(begin, begin + step)
        entry = torch.arange(begin, min(begin + step, len(graph.data)), device=graph.device)
        row = torch.searchsorted(graph.indptr, entry, right=True) - 1
        yield row, graph.indices[part].long(), graph.data[part]


def _distances(graph: Any, labels: Tensor) -> DistanceGraph:
    read = read_graph(_OP, graph)
    if read.n != len(labels):
        raise ValueError(f"{_OP}: graph must have one row for each label ({len(labels)}), got {read.n}")
    require_same_device(_OP, "graph", read.data, "labels", labels)
    if read.data.numel() and not (read.data.min() >= 0 and read.data.max() <= 1):  # NaN is neither
        raise ValueError(f"{_OP}: graph must hold distances in [0, 1], got others")
    return read

# SPDX-License-Identifier: Apache-2.0
"""Features to pseudo-labels: the whole clustering step of an epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastreid_u import _ext
from fastreid_u._checks import one_or_more, require_features, require_in_range, require_positive_int
from fastreid_u.ops._compiled import entry_point
from fastreid_u.ops._dispatch import choose, missing
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.k_reciprocal import neighbour_counts, neighbours
from fastreid_u.ops.knn import require_hint
from fastreid_u.ops.pseudo_labels_sharded import LabelStep, agreed, share_clustering, share_search
from fastreid_u.ranks import Ranks

_OP = "pseudo_labels"


def pseudo_labels(
    x: Tensor,
    *,
    eps: float | Sequence[float] = 0.6,
    min_samples: int = 4,
    k1: int = 30,
    k2: int | None = None,
    knn: tuple[Tensor, Tensor] | None = None,
    hint: Tensor | None = None,
    compat: bool = False,
    group: object | None = None,
    backend: str = "auto",
) -> Tensor:
    """DBSCAN labels of ``x`` in the Jaccard distance of k-reciprocal neighbourhoods.

    Args:
        x: (N, D) floating point features, any device; taken in float32. Unit rows are usual, not needed.
        eps: neighbourhood radius, in (0, 1), inclusive, compared in float32. A sequence gives one row of labels for
            each, on one encoding.
        min_samples: points within eps, the point itself included, that make a core point.
        k1, k2, knn, compat: as in :func:`fastreid_u.jaccard_graph`.
        hint: rows that may be near, (N, h) integers as in :func:`fastreid_u.knn`, such as last epoch's neighbours; a
            search takes less time, and the labels are the same whatever they are. Not used with ``knn``.
        group: a process group of ``torch.distributed`` that this process is in, or "world": every rank of it calls with
            the same arguments and all N rows, does its share, and gets the same labels, those of one process alone
            (:mod:`fastreid_u.ops.pseudo_labels_sharded`). The backend is then chosen by the device.
        backend: "auto", "cpp" (a CPU, as many threads as ``torch.get_num_threads()``; the encoding by numba), "cuda" (a
            GPU; the encoding by Triton), "cupy" (the same kernels, compiled by CuPy at first use), "triton" (a GPU: the
            graph of that backend, and the DBSCAN core) or "reference" (its graph and its DBSCAN); anything but "auto"
            runs there or raises.

    Returns:
        (N,) int64 on ``x``'s device: -1 for noise, else a cluster 0 .. C - 1, numbered as scikit-learn numbers them;
        (len(eps), N) for a sequence. The same as ``dbscan(jaccard_graph(x, radius=eps, ...), eps, min_samples)`` on
        the same backend.

    Raises:
        TypeError, ValueError: wrong type, shape or count; NaN or infinity in ``x`` (the message counts the rows). With
            a group also if ranks were not given the same; a fault on one rank raises on all of them.
        RuntimeError: the backend asked for is not available here; a group without torch.distributed.

    "cpp", "cuda" and "cupy" store no pair within eps, so memory does not depend on how many there are: 25 N k1 bytes
    for neighbour lists (24 N k1 on a GPU), and with m entries in the encoding (50 to 100 a row with the defaults) 16 m
    and 65 N for the clustering (80 N if ``min_samples`` is above 4), beside blocks of bounded size. Work is bounded by
    the pairs that share a rare column; if all features collapse to one point, it is m. "triton" and the reference
    store the graph, 12 bytes for each pair within eps, which is 12 N^2 then. Rows of zeros, as a dead feature extractor
    makes them, are copies of each other and cluster as copies do (see :func:`fastreid_u.jaccard_graph`).
    """
    if group is not None and backend != "auto":
        raise ValueError(f"{_OP}: backend must be 'auto' with a group, got {backend!r}")
    ranks = None if group is None else Ranks(_OP, group)
    check = functools.partial(_checked, x, eps, min_samples, k1, k2, knn, hint, compat)
    step, several, hint = check() if ranks is None else agreed(check, ranks)
    shared = ranks is not None and len(step.x) > 0
    if shared and step.knn is None:
        step = step._replace(knn=share_search(step, ranks, hint))
    if shared and step.x.device.type == "cpu" and not missing("numba"):
        labels = share_clustering(step, ranks)
    else:
        _ext.core()  # every backend ends in its DBSCAN, so without it none is chosen
        encoders = {"cpp": _encode_by_numba, "cuda": _encode_by_triton, "cupy": _encode_by_triton}
        runs = {name: functools.partial(_graph_free, backend=name, encode=by) for name, by in encoders.items()}
        cannot = {"cpp": missing("numba"), "cuda": missing("triton"), "cupy": missing("triton")}
        run = choose(_OP, step.x.device, backend, cannot=cannot, **runs, triton=_triton, reference=_by_graph)
        if step.knn is None:
            step = step._replace(knn=neighbours(_OP, step.x, step.k1, None, hint))
        labels = run(**step._asdict())
        if shared:
            labels = ranks.from_first(labels)
    return labels if several else labels[0]


def _checked(x, eps, min_samples, k1, k2, knn, hint, compat) -> tuple[LabelStep, bool, Tensor | None]:
    """The arguments of the step, whether eps was a sequence, and the hint."""
    x = require_features(_OP, "x", x)
    eps, several = one_or_more(_OP, "eps", eps)
    radii = [require_in_range(_OP, "eps", e, 0, 1, open_low=True, open_high=True) for e in eps]
    min_samples = require_positive_int(_OP, "min_samples", min_samples)
    k1, k2 = neighbour_counts(_OP, k1, k2, len(x), stacklevel=4)
    knn = None if knn is None else neighbours(_OP, x, k1, knn)
    hint = None if hint is None else require_hint(_OP, hint, x, x)
    return LabelStep(x, radii, min_samples, k1, k2, knn, compat), several, hint


def _graph_free(
    x: Tensor,
    *,
    eps: list[float],
    min_samples: int,
    k1: int,
    k2: int,
    knn: tuple[Tensor, Tensor],
    compat: bool,
    backend: str,
    encode: Callable,
) -> Tensor:
    """DBSCAN of the fixed-point encoding by the compiled core (csrc/pseudo_labels.h)."""
    n = len(x)
    labels = torch.empty(len(eps), n, dtype=torch.int64, device=x.device)
    if n == 0:
        return labels
    lists = knn[1][:, :k1].to(torch.int32).contiguous()
    (crow, column, mass, weight), least_overlap = encode(x, lists, k2, compat)
    min_samples = min(min_samples, n + 1)  # no point is core either way
    words = _ext.core().pseudo_labels_scratch_words(n, len(column), min_samples)
    scratch = torch.empty(words, dtype=torch.int64, device=x.device)
    encoding = _ext.core().Encoding(
        indptr=crow.data_ptr(),
        column=column.data_ptr(),
        mass=mass.data_ptr(),
        neighbours=lists.data_ptr(),
        n=n,
        nnz=len(column),
        k=lists.shape[1],
        weight=weight,
    )
    need = [least_overlap(e, weight) for e in eps]
    cluster = entry_point("pseudo_labels", backend, scratch)
    cluster(encoding, need=need, min_samples=min_samples, labels=labels.data_ptr())
    return labels


def _encode_by_numba(x: Tensor, lists: Tensor, k2: int, compat: bool) -> tuple[tuple, Callable]:
    """Row starts, ascending columns, integers, what a row adds up to; and the distance that overlaps mean."""
    from fastreid_u.cpu.jaccard import least_overlap
    from fastreid_u.cpu.k_reciprocal import encode
    from fastreid_u.cpu.rows import row_weight, sort_rows

    threads = torch.get_num_threads()
    rows = encode(x.contiguous().numpy(), lists.numpy(), k2, compat=compat, fixed=True, threads=threads)
    if k2 > 1:
        sort_rows(rows, np.arange(len(x), dtype=np.int32), threads)
    return (*map(torch.from_numpy, rows), row_weight(k2)), least_overlap


def _encode_by_triton(x: Tensor, lists: Tensor, k2: int, compat: bool) -> tuple[tuple, Callable]:
    from fastreid_u.kernels.jaccard import least_overlap
    from fastreid_u.kernels.k_reciprocal import k_reciprocal

    return k_reciprocal(x, lists, lists.shape[1], k2, compat=compat), least_overlap


def _triton(x: Tensor, *, eps: list[float], min_samples: int, **encoding: object) -> Tensor:
    graph = jaccard_graph(x, radius=max(eps), backend="triton", **encoding)
    return dbscan(graph, eps, min_samples, radius=max(eps))


def _by_graph(x: Tensor, *, eps: list[float], min_samples: int, **encoding: object) -> Tensor:
    graphs = {e: jaccard_graph(x, radius=e, backend="reference", **encoding) for e in eps}
    return torch.stack([dbscan(graphs[e], e, min_samples, radius=e, backend="reference") for e in eps])

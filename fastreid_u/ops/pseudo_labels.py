# SPDX-License-Identifier: Apache-2.0
"""Features to pseudo-labels: the whole clustering step of an epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastreid_u import _env, _ext
from fastreid_u._checks import one_or_more, require_features, require_in_range, require_positive_int
from fastreid_u.ops._core import entry_point, missing
from fastreid_u.ops._dispatch import choose
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.k_reciprocal import neighbour_counts, neighbours


def pseudo_labels(
    x: Tensor,
    *,
    eps: float | Sequence[float] = 0.6,
    min_samples: int = 4,
    k1: int = 30,
    k2: int = 6,
    knn: tuple[Tensor, Tensor] | None = None,
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
        group: a process group of ``torch.distributed``, or "world": every rank of it calls with the same arguments and
            all N rows, does its share, and gets the same labels (:mod:`fastreid_u.ops.pseudo_labels_sharded`). The
            backend is then chosen by the device.
        backend: "auto", "cpp" (a CPU, as many threads as ``torch.get_num_threads()``; the encoding by numba), "cuda" (a
            GPU; the encoding by Triton), "cupy" (the same kernels, compiled by CuPy at first use), "triton" (a GPU: the
            graph of that backend, and the DBSCAN core) or "reference" (its graph and its DBSCAN); anything but "auto"
            runs there or raises.

    Returns:
        (N,) int64 on ``x``'s device: -1 for noise, else a cluster 0 .. C - 1, numbered as scikit-learn numbers them;
        (len(eps), N) for a sequence. The same as ``dbscan(jaccard_graph(x, radius=eps, ...), eps, min_samples)`` on
        the same backend.

    Raises:
        TypeError, ValueError: wrong type, shape or count; NaN or infinity in ``x`` (the message counts the rows).

    "cpp", "cuda" and "cupy" store no pair within eps, so memory does not depend on how many there are: 25 N k1 bytes
    for neighbour lists (24 N k1 on a GPU), and with m entries in the encoding (50 to 100 a row with the defaults) 16 m
    and 65 N for the clustering (80 N if ``min_samples`` is above 4), beside blocks of bounded size. Work is bounded by
    the pairs that share a rare column; if all features collapse to one point, it is m. "triton" and the reference
    store the graph, 12 bytes for each pair within eps, which is 12 N^2 then. Rows of zeros, as a dead feature extractor
    makes them, are copies of each other and cluster as copies do (see :func:`fastreid_u.jaccard_graph`).
    """
    op = "pseudo_labels"
    if group is not None:
        from fastreid_u.ops.pseudo_labels_sharded import pseudo_labels_sharded  # which calls this function in turn

        if backend != "auto":
            raise ValueError(f"{op}: backend must be 'auto' with a group, got {backend!r}")
        return pseudo_labels_sharded(
            x, eps=eps, min_samples=min_samples, k1=k1, k2=k2, knn=knn, compat=compat, group=group
        )
    x = require_features(op, "x", x)
    eps, several = one_or_more(op, "eps", eps)
    radii = [require_in_range(op, "eps", e, 0, 1, open_low=True, open_high=True) for e in eps]
    min_samples = require_positive_int(op, "min_samples", min_samples)
    k1, k2 = neighbour_counts(op, k1, k2, len(x))
    numba, triton = _env.numba(), _env.triton()
    encoders = {
        "cpp": _encode_by_numba if numba.present else numba.detail,
        "cuda": _encode_by_triton if triton.present else triton.detail,
    }
    encoders["cupy"] = encoders["cuda"]
    table: dict[str, Callable | str] = {
        name: missing(name)
        or (functools.partial(_graph_free, backend=name, encode=encode) if callable(encode) else encode)
        for name, encode in encoders.items()
    }
    table |= {"triton": _triton if triton.present else triton.detail, "reference": _by_graph}
    run = choose(op, x.device, backend, table)
    knn = neighbours(op, x, k1, knn)
    labels = run(x, eps=radii, min_samples=min_samples, k1=k1, k2=k2, knn=knn, compat=compat)
    return labels if several else labels[0]


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
    min_samples = min(min_samples, n + 1)  # nobody is core anyway
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
    from fastreid_u.cpu.k_reciprocal import bits, encode, sort_rows

    threads = torch.get_num_threads()
    rows = encode(x.contiguous().numpy(), lists.numpy(), k2, compat=compat, fixed=True, threads=threads)
    if k2 > 1:
        sort_rows(rows, np.arange(len(x), dtype=np.int32), threads)
    return (*map(torch.from_numpy, rows), k2 << bits(k2)), least_overlap


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

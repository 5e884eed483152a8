# SPDX-License-Identifier: Apache-2.0
"""DBSCAN on a graph of distances, with scikit-learn's labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from fastreid_u import _ext
from fastreid_u._checks import one_or_more, require_positive, require_positive_int
from fastreid_u.ops._compiled import entry_point
from fastreid_u.ops._dispatch import choose, missing
from fastreid_u.ops._distance_graph import DistanceGraph, read_graph
from fastreid_u.reference import dbscan as reference

_OP = "dbscan"

# The compiled check's names for what is wrong with a row; unsorted columns are mended, so the last is about duplicates.
_RULES = {
    "indptr": "have row pointers that start at 0, never fall and end at the number of entries, got others at",
    "column": "hold columns in [0, N), got one outside in",
    "nan": "hold no NaN, got one in",
    "negative": "hold no negative distance, got one in",
    "order": "store every pair once, got one twice in",
}


def dbscan(
    graph: Any,
    eps: float | Sequence[float],
    min_samples: int = 4,
    *,
    radius: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cluster the N points of a graph of distances; labels equal scikit-learn's, numbering included.

    A point is core if at least ``min_samples`` entries of its row are within eps, the point itself among them (unless
    the graph stores a diagonal entry beyond eps). Clusters are numbered by their smallest core point; a point at the
    border of several joins the one with the smallest number; the rest is noise.

    Args:
        graph: (N, N) distances, none negative, none NaN; inf is allowed. Dense (torch, NumPy, ``__dlpack__``) or sparse
            (``torch.sparse_csr``, ``sparse_csc``, ``sparse_coo``, SciPy): there an entry that is not stored is farther
            than any eps, except on the diagonal, where it is 0. An asymmetric graph is read as scikit-learn reads it:
            row i holds what i reaches.
        eps: distance up to which two points are neighbours, inclusive; any positive number. float32 distances are
            compared in float32, so that float32(0.6) is within 0.6, whatever type of number eps is; all others, half
            precision among them, in float64. A sequence gives one row of labels for each, on one graph.
        min_samples: neighbours that make a core point.
        radius: distance up to which a sparse graph is complete, if known; a larger eps is then refused.
        backend: "auto", "cpp" (CPU threads, as many as ``torch.get_num_threads()``), "cuda", "cupy" (the same kernels,
            compiled by CuPy at first use) or "reference"; anything but "auto" runs there or raises. The two for a CPU
            copy a graph over that is on a GPU, and "auto" does where neither GPU backend is there.

    Returns:
        (N,) int64 on the graph's device (CPU for NumPy and SciPy), -1 = noise; (len(eps), N) for a sequence.

    Raises:
        ValueError: bad eps, min_samples or radius; a graph that is not square, holds NaN or negative distances, or
            stores a pair twice.
        TypeError: a graph of another kind.
        RuntimeError: the backend asked for is not available here.

    Memory beside the graph: 24 N bytes, and 9 N for each eps. Columns that do not ascend within their rows cost a
    sorted copy. Not differentiable; the same result for any number of threads. Ester et al., KDD 1996.
    """
    read = read_graph(_OP, graph)
    eps, several = one_or_more(_OP, "eps", eps)
    labels, _ = cluster(read, eps, min_samples, radius, backend)
    return labels if several else labels[0]


def cluster(
    graph: DistanceGraph, eps: list[float], min_samples: int, radius: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(E, N) labels and (E, N) core flags on the graph's device."""
    _ext.core()  # it checks the graph for every backend, so without it none is chosen
    min_samples = min(require_positive_int(_OP, "min_samples", min_samples), graph.n + 1)  # more than all is too many
    eps = [require_positive(_OP, "eps", e) for e in eps]
    radii = [] if radius is None else [require_positive(_OP, "radius", radius)]
    eps, radii = ([_threshold(number, graph.dtype) for number in numbers] for numbers in (eps, radii))
    if radii and max(eps) > radii[0]:
        raise ValueError(f"{_OP}: eps must be at most radius={radius:g}, got {max(eps):g}")

    home = graph.device
    on_gpu = backend in ("cuda", "cupy") or (backend == "auto" and not (missing("cuda") and missing("cupy")))
    if home.type != "cpu" and not on_gpu:
        graph = graph.to("cpu")
    runs = {name: functools.partial(_compiled, backend=name) for name in ("cpp", "cuda", "cupy")}
    run = choose(_OP, graph.device, backend, **runs, reference=_reference)
    labels, core = run(graph, eps, min_samples)
    return labels.to(home), core.to(home)


def _threshold(eps: float, dtype: torch.dtype) -> float:
    """What stored distances are compared with so that the outcome is that of ``eps`` in the type that they count in.

    Half precision is kept in float32 and counts in float64: a distance is within eps if it is within the largest
    float32 that is.
    """
    if dtype == torch.float64 or not dtype.is_floating_point:
        return eps
    single = torch.tensor(eps, dtype=torch.float32, device="cpu").clamp_(max=torch.finfo(torch.float32).max)
    if dtype != torch.float32 and single.item() > eps:
        single = torch.nextafter(single, torch.zeros_like(single))
    return single.item()


def _compiled(graph: DistanceGraph, eps: list[float], min_samples: int, *, backend: str) -> tuple[Tensor, Tensor]:
    graph = _checked(graph, backend)
    labels = torch.empty(len(eps), graph.n, dtype=torch.int64, device=graph.device)
    core = torch.empty(len(eps), graph.n, dtype=torch.bool, device=graph.device)
    scratch = _scratch(graph)
    cluster = entry_point(_OP, backend, scratch)
    cluster(_pointers(graph), eps=eps, min_samples=min_samples, labels=labels.data_ptr(), core=core.data_ptr())
    return labels, core


def _reference(graph: DistanceGraph, eps: list[float], min_samples: int) -> tuple[Tensor, Tensor]:
    graph = _checked(graph, "cpp")
    plain = graph.data.numpy()
    if graph.indptr is not None:
        parts = (plain, graph.indices.numpy(), graph.indptr.numpy())
        plain = scipy.sparse.csr_array(parts, shape=(graph.n, graph.n))
    core = torch.stack([reference.core_points(plain, e, min_samples) for e in eps])
    return reference.dbscan(plain, eps, min_samples), core


def _checked(graph: DistanceGraph, backend: str) -> DistanceGraph:
    """The graph with ascending columns, or an error that names the first faulty row."""
    scratch = _scratch(graph)
    check = entry_point("check_graph", backend, scratch)
    faults = _ext.core().faults
    code = check(_pointers(graph))
    if code >= 0 and faults[code % len(faults)] == "order":
        graph = graph.sorted()
        code = check(_pointers(graph))
    if code >= 0:
        raise ValueError(f"{graph.called} must {_RULES[faults[code % len(faults)]]} row {code // len(faults)}")
    return graph


def _scratch(graph: DistanceGraph) -> Tensor:
    """Working memory from torch's allocator; its owner keeps it alive during the call."""
    return torch.empty(_ext.core().dbscan_scratch_words(graph.n), dtype=torch.int64, device=graph.device)


def _pointers(graph: DistanceGraph) -> Any:
    sparse = graph.indptr is not None
    return _ext.core().Graph(
        indptr=graph.indptr.data_ptr() if sparse else 0,
        indices=graph.indices.data_ptr() if sparse else 0,
        data=graph.data.data_ptr(),
        n=graph.n,
        nnz=graph.data.numel(),
        index_bytes=graph.indices.element_size() if sparse else 8,
        value_bytes=graph.data.element_size(),
    )

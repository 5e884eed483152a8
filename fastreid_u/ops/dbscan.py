# SPDX-License-Identifier: Apache-2.0
"""DBSCAN on a graph of distances, with scikit-learn's labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from fastreid_u import _ext
from fastreid_u._checks import one_or_more, require_choice, require_positive, require_positive_int
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
            (``torch.sparse_csr``, SciPy): there an entry that is not stored is farther than any eps, except on the
            diagonal, where it is 0. An asymmetric graph is read as scikit-learn reads it: row i holds what i reaches.
        eps: distance up to which two points are neighbours, inclusive; any positive number. It is rounded to the
            graph's dtype and compared there. A sequence gives one row of labels for each, on one graph.
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
    labels, _ = _cluster(read, eps, min_samples, radius, backend)
    return labels if several else labels[0]


@dataclass(eq=False)
class DBSCAN:
    """:func:`dbscan` with the face of ``sklearn.cluster.DBSCAN``, for code that expects that class.

    Args:
        eps: as in :func:`dbscan`, one number.
        min_samples: as in :func:`dbscan`.
        metric: only "precomputed".
        n_jobs: accepted and not used; threads follow ``torch.set_num_threads``.

    Attributes:
        labels_: (N,) int64 NumPy, after ``fit``.
        core_sample_indices_: ascending int64 NumPy, after ``fit``.
    """

    eps: float = 0.5
    min_samples: int = field(default=5, kw_only=True)
    metric: str = field(default="precomputed", kw_only=True)
    n_jobs: int | None = field(default=None, kw_only=True)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, as scikit-learn's ``clone`` asks for them."""
        return {name: getattr(self, name) for name in ("eps", "min_samples", "metric", "n_jobs")}

    def set_params(self, **params: Any) -> DBSCAN:
        """Change arguments by name."""
        for name, value in params.items():
            require_choice("DBSCAN", "params", name, tuple(self.get_params()))
            setattr(self, name, value)
        return self

    def fit(self, X: Any, y: None = None) -> DBSCAN:
        """Cluster the (N, N) distances ``X``, of any form that :func:`dbscan` takes. ``y`` is ignored."""
        require_choice("DBSCAN", "metric", self.metric, ("precomputed",))
        labels, core = _cluster(read_graph("DBSCAN", X), [self.eps], self.min_samples, None, "auto")
        self.labels_: np.ndarray = labels[0].cpu().numpy()
        self.core_sample_indices_: np.ndarray = core[0].nonzero().flatten().cpu().numpy()
        return self

    def fit_predict(self, X: Any, y: None = None) -> np.ndarray:
        """``fit(X).labels_``"""
        return self.fit(X).labels_


def _cluster(
    graph: DistanceGraph, eps: list[float], min_samples: int, radius: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(E, N) labels and (E, N) core flags on the graph's device."""
    _ext.core()  # it checks the graph for every backend, so without it none is chosen
    min_samples = min(require_positive_int(_OP, "min_samples", min_samples), graph.n + 1)  # more than all is too many
    eps = [require_positive(_OP, "eps", e) for e in eps]
    radii = [] if radius is None else [require_positive(_OP, "radius", radius)]
    if graph.dtype.is_floating_point:  # rounded here, because a float16 graph is widened and still compared as float16
        eps, radii = (torch.tensor(each, dtype=graph.dtype, device="cpu").double().tolist() for each in (eps, radii))
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
        raise ValueError(f"{_OP}: graph must {_RULES[faults[code % len(faults)]]} row {code // len(faults)}")
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

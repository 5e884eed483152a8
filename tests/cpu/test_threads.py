# SPDX-License-Identifier: Apache-2.0
"""The results do not depend on the number of threads, and what is compiled need not be stored."""

import torch

from fastreid_u.cpu import _threads
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels


def test_threads_do_not_matter(clustered):
    x = clustered(1200, 24, spread=0.9)
    x[::50] = x[7]
    usual = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            nearest = knn(x, 30, backend="numba")
            graph = jaccard_graph(x, radius=0.7, knn=nearest, backend="numba")
            v = k_reciprocal_encoding(x, knn=nearest, backend="numba")
            labels = pseudo_labels(x, eps=[0.5, 0.6], knn=nearest, backend="cpp")
            parts = [(m.crow_indices(), m.col_indices(), m.values()) for m in (graph, v)]
            found.append((*nearest, *parts[0], *parts[1], labels))
    finally:
        torch.set_num_threads(usual)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_kernels_compile_where_nothing_can_be_written(monkeypatch):
    real = _threads.njit

    def njit(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(function, **options)

    monkeypatch.setattr(_threads, "njit", njit)
    assert _threads.kernel(lambda a: a + 1)(1) == 2

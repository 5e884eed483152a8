# SPDX-License-Identifier: Apache-2.0
"""dbscan against scikit-learn and cuML, on sparse graphs like those of a late epoch. Equal labels before the clock.

cuML takes all pairs, N x N, and numbers clusters in its own order: its labels are compared as a partition, points of no
core but near several of them left out, which may join any.

pytest benchmarks/bench_dbscan.py --benchmark-only
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster
import torch
from rivals import why_not

import fastreid_u
from fastreid_u.ops._dispatch import missing

SIZES = {"small": 2_000, "market1501": 12_936, "msmt17": 32_621}
EPS, MIN_SAMPLES = 0.6, 4
ON_GPU = ("cuda", "cupy")


@functools.cache
def graph(n: int) -> scipy.sparse.csr_array:
    """A symmetric graph of distances in (0, 1): identities of about 17 images, about 50 stored entries a row.

    Most entries join strangers, beyond eps but for one in two thousand, which makes bridges; one point in ten is near
    no other, which makes noise.
    """
    rng = np.random.default_rng(0)
    identity = np.sort(rng.integers(0, n // 17, n))
    outlier = rng.random(n) < 0.1
    begin, end = np.searchsorted(identity, identity), np.searchsorted(identity, identity, side="right")
    row, stranger_row = np.repeat(np.arange(n), 10), np.repeat(np.arange(n), 20)
    friend = begin[row] + (rng.random(len(row)) * (end - begin)[row]).astype(np.int64)
    stranger = rng.integers(0, n, len(stranger_row))
    near = np.where(outlier[row] | outlier[friend], 0.8, rng.beta(4, 4, len(row)))
    far = np.where(rng.random(len(stranger)) < 0.0005, 0.55, 0.9)
    distance, ends = np.concatenate([near, far]), np.stack([[*row, *stranger_row], [*friend, *stranger]])
    pairs, first = np.unique(np.sort(ends, axis=0), axis=1, return_index=True)  # every pair once, then both ways
    low, high = pairs
    value = np.where(low == high, 0.0, distance[first]).astype(np.float32)
    upper = scipy.sparse.csr_array((value, (low, high)), shape=(n, n))
    return upper.maximum(upper.T).tocsr()


@functools.cache
def expected(n: int) -> np.ndarray:
    return sklearn.cluster.DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed").fit(graph(n)).labels_


def contenders(n: int) -> dict[str, Callable[[], np.ndarray]]:
    """Each takes the graph as its users hold it; the GPU one synchronises by copying the labels back."""
    ours = functools.partial(fastreid_u.dbscan, min_samples=MIN_SAMPLES)
    theirs = sklearn.cluster.DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed", n_jobs=-1)
    found = {
        "cpp": lambda: ours(graph(n), EPS, backend="cpp").numpy(),
        "sklearn": lambda: theirs.fit_predict(graph(n)),
    }
    for backend in filter(lambda name: missing(name) is None, ON_GPU):
        rows = graph(n)
        parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
        on_gpu = torch.sparse_csr_tensor(*parts, size=rows.shape).cuda()
        found[backend] = lambda on_gpu=on_gpu, name=backend: ours(on_gpu, EPS, backend=name).cpu().numpy()
    if why_not("cuml") is None:
        pairs = torch.ones(n, n, device="cuda")
        entries = graph(n).tocoo()
        pairs[tuple(map(torch.from_numpy, entries.coords))] = torch.from_numpy(entries.data).cuda()
        found["cuml"] = lambda pairs=pairs: cuml(pairs)
    return found


def cuml(pairs: torch.Tensor) -> np.ndarray:
    import cupy
    from cuml.cluster import DBSCAN

    found = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed").fit_predict(cupy.from_dlpack(pairs))
    return cupy.asnumpy(found)


def require_equal(labels: np.ndarray, n: int, name: str) -> None:
    """The labels of scikit-learn, number by number; of cuML the partition of the core points."""
    wanted = expected(n)
    if name == "cuml":
        rows = graph(n)
        rows.data = (rows.data <= np.float32(EPS)).astype(rows.data.dtype)
        core = np.asarray(rows.sum(axis=1)).ravel() >= MIN_SAMPLES
        assert (labels >= 0)[core].all()
        pairs = np.unique(np.stack([labels[core], wanted[core]]), axis=1)
        assert pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
    else:
        np.testing.assert_array_equal(labels, wanted)


@pytest.mark.parametrize("name", ["cpp", *ON_GPU, "sklearn", "cuml", "flashlib"])
@pytest.mark.parametrize("size", SIZES)
def bench_dbscan(benchmark, size: str, name: str) -> None:
    n = SIZES[size]
    if name in ON_GPU and missing(name):
        pytest.skip(missing(name))
    if name == "flashlib":
        pytest.skip("FlashLib's DBSCAN takes points with Euclidean distances, no graph")
    if reason := why_not(name):
        pytest.skip(reason)
    run = contenders(n)[name]
    require_equal(run(), n, name)
    labels = benchmark(run)
    rows = graph(n)
    benchmark.extra_info |= {
        "n": n,
        "stored": int(rows.nnz),
        "edges": int((rows.data <= np.float32(EPS)).sum()),
        "clusters": int(labels.max()) + 1,
        "noise": int((labels < 0).sum()),
        "scratch_bytes": 24 * n if name in ("cpp", *ON_GPU) else None,
    }

# SPDX-License-Identifier: Apache-2.0
"""dbscan against scikit-learn, on sparse graphs like those of a late epoch. Equal labels first, then the clock.

pytest benchmarks/bench_dbscan.py --benchmark-only
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster
import torch

import fastreid_u
from fastreid_u.ops._core import missing

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
    return found


@pytest.mark.parametrize("name", ["cpp", *ON_GPU, "sklearn"])
@pytest.mark.parametrize("size", SIZES)
def bench_dbscan(benchmark, size: str, name: str) -> None:
    n = SIZES[size]
    if name in ON_GPU and missing(name):
        pytest.skip(missing(name))
    run = contenders(n)[name]
    np.testing.assert_array_equal(run(), expected(n))
    labels = benchmark(run)
    rows = graph(n)
    benchmark.extra_info |= {
        "n": n,
        "stored": int(rows.nnz),
        "edges": int((rows.data <= np.float32(EPS)).sum()),
        "clusters": int(labels.max()) + 1,
        "noise": int((labels < 0).sum()),
        "scratch_bytes": 24 * n if name != "sklearn" else None,
    }

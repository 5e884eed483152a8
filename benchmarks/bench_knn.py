# SPDX-License-Identifier: Apache-2.0
"""Exact neighbours against plain torch, scikit-learn, faiss, cuML, cuVS and FlashLib, where they are installed.

    pytest benchmarks/bench_knn.py --benchmark-only -k market1501

Ours must equal the reference on sampled rows, indices and distances, before it is timed. The rivals round, so
neighbours that are almost equally far may change places: they must find 99.9 % of the same ones, and the share is in
``extra_info``.
"""

import numpy as np
import pytest
import torch
from rivals import why_not

from fastreid_u.ops.knn import knn
from fastreid_u.reference.knn import knn as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K, SAMPLED = 30, 256
SIZES = {"tiny": (300, 32), "market1501": (12_936, 2048), "trained": (12_936, 2048)}  # trained: a network's features
if DEVICE.type == "cuda":
    SIZES |= {"msmt17": (32_621, 2048), "100k": (100_000, 2048), "1M": (1_000_000, 2048)}
# Rows up to which a rival runs; faiss may be the build without a GPU.
MOST = {"reference": 12_936, "sklearn": 12_936, "faiss": 32_621, "torch": 100_000, "cuml": 100_000, "cuvs": 100_000}


def ours(x):
    return knn(x, K)


def plain(x):
    """The obvious way: a block of distances by a product of matrices, then topk."""
    norm = x.square().sum(dim=1)
    step = max(1, 2**27 // len(x))
    found = [
        (norm[a : a + step, None] + norm - 2 * (x[a : a + step] @ x.T)).topk(K, largest=False)
        for a in range(0, len(x), step)
    ]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def slow(x):
    return reference(x, K)


def sklearn(x):
    from sklearn.neighbors import NearestNeighbors

    x = x.cpu().numpy()
    found = NearestNeighbors(n_neighbors=K, algorithm="brute", n_jobs=torch.get_num_threads()).fit(x).kneighbors(x)
    return tuple(map(torch.from_numpy, found))


def faiss(x):
    import faiss

    x = np.ascontiguousarray(x.cpu().numpy())
    index = faiss.IndexFlatL2(x.shape[1])
    if hasattr(faiss, "StandardGpuResources") and DEVICE.type == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(x)
    return tuple(map(torch.from_numpy, index.search(x, K)))


def cuml(x):
    import cupy
    from cuml.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(cupy.from_dlpack(x)).kneighbors(cupy.from_dlpack(x))
    return tuple(torch.from_dlpack(cupy.asarray(part)) for part in found)


def cuvs(x):
    import cupy
    from cuvs.neighbors import brute_force

    found = brute_force.search(brute_force.build(x, metric="sqeuclidean"), x, K)
    return tuple(torch.from_dlpack(cupy.asarray(part)) for part in found)


def flashlib(x):
    from flashlib import flash_knn

    return flash_knn(x, x, K)  # in the type of x, which it calls exact


RIVALS = {
    "fastreid_u": ours,
    "torch": plain,
    "reference": slow,
    "sklearn": sklearn,
    "faiss": faiss,
    "cuml": cuml,
    "cuvs": cuvs,
    "flashlib": flashlib,
}


@pytest.fixture(scope="module", params=SIZES)
def workload(request, reid_features, trained_features):
    n, d = SIZES[request.param]
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 * n * d:
        pytest.skip(f"{n} x {d} needs {10 * n * d / 1e9:.0f} GB of free GPU memory")
    return request.param, (trained_features if request.param == "trained" else reid_features)(n, d, DEVICE)


@pytest.mark.parametrize("name", RIVALS)
def bench_knn(benchmark, workload, name, peak_bytes, ceilings):
    size, x = workload
    (n, d), run = x.shape, RIVALS[name]
    if reason := why_not(name):
        pytest.skip(reason)
    if n > MOST.get(name, n):
        pytest.skip(f"{name} runs up to {MOST[name]} rows")

    def timed():
        found = run(x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return found

    rows = torch.arange(0, n, max(1, n // SAMPLED), device=DEVICE)
    expected = reference(x[rows], K, gallery=x)
    found, peak = peak_bytes(timed, DEVICE)
    found = [part.to(DEVICE)[rows] for part in found]
    same = (found[1][:, :, None] == expected[1][:, None]).any(dim=2).float().mean().item()
    if name in ("fastreid_u", "reference"):
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0], rtol=1.2e-7, atol=0)
    assert same >= 0.999

    benchmark.group = f"knn {size}, N={n} D={d} k={K}, {DEVICE.type}"
    flop = 2 * n * n * d
    benchmark.extra_info |= {
        "same neighbours": round(same, 6),
        "flop": flop,
        "bytes": x.nbytes + 12 * n * K,
        "peak_bytes": peak,
    }
    if flop < 1e11:
        benchmark(timed)
    else:
        benchmark.pedantic(timed, rounds=3)
    if "fp16 TFLOP/s" in ceilings and benchmark.stats:
        benchmark.extra_info["share of fp16 rate"] = flop / benchmark.stats.stats.median / ceilings["fp16 TFLOP/s"]

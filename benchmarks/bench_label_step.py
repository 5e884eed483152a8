# SPDX-License-Identifier: Apache-2.0
"""The whole clustering step of an epoch, features to pseudo-labels, at the sizes of the data sets.

    pytest benchmarks/bench_label_step.py --benchmark-only -k market1501

Labels must equal those of the CPU's core before anything is timed; there the neighbour search is the CPU's own up to
100,000 rows, and the timed one's beyond (``bench_knn.py`` checks that one by itself). ``extra_info`` has the time that
comes after the search. "trained" are a network's features, whose labels must equal those of the rival: the published
pipeline restated (``published/``), with a flat search by faiss. ``bench_pseudo_labels.py`` has the published algorithm
after the search.
"""

import statistics
import time

import pytest
import torch
from published.label import label
from rivals import why_not

from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K1, ROUNDS, SEARCHED_TWICE = 30, 3, 100_000
SIZES = {"tiny": (2_000, 64), "market1501": (12_936, 2048), "trained": (12_936, 2048)}
if DEVICE.type == "cuda":
    SIZES |= {"msmt17": (32_621, 2048), "100k": (100_000, 2048), "1M": (1_000_000, 2048)}


@pytest.mark.parametrize("size", SIZES)
def bench_label_step(benchmark, size, reid_features, trained_features, peak_bytes, ceilings):
    n, d = SIZES[size]
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 * n * d:
        pytest.skip(f"{n} x {d} needs {10 * n * d / 1e9:.0f} GB of free GPU memory")
    x = (trained_features if size == "trained" else reid_features)(n, d, DEVICE)

    def timed(found=None):
        labels = pseudo_labels(x, k1=K1, knn=found)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return labels

    labels, peak = peak_bytes(timed, DEVICE)
    found = knn(x, K1)
    lists = knn(x.cpu(), K1) if n <= SEARCHED_TWICE else tuple(part.cpu() for part in found)
    assert torch.equal(labels.cpu(), pseudo_labels(x.cpu(), k1=K1, knn=lists, backend="cpp"))

    after = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        timed(found)
        after.append(time.perf_counter() - begin)
    del found, lists
    benchmark.group = f"label step {size}, N={n} D={d} k1={K1}, {DEVICE.type}"
    if 2 * n * n * d < 1e13:
        benchmark(timed)
    else:
        benchmark.pedantic(timed, rounds=ROUNDS)
    benchmark.extra_info |= {
        "clusters": int(labels.max()) + 1,
        "noise": round((labels < 0).float().mean().item(), 3),
        "ms after the search": 1e3 * statistics.median(after),
        "peak_bytes": peak,
    }
    if "fp16 TFLOP/s" in ceilings and benchmark.stats:
        search = benchmark.stats.stats.median - statistics.median(after)
        benchmark.extra_info["share of the search in fp16 rate"] = 2 * n * n * d / search / ceilings["fp16 TFLOP/s"]


def bench_published_label_step(benchmark, trained_features):
    if (why := why_not("faiss")) is not None:
        pytest.skip(why)
    n, d = SIZES["trained"]
    x = trained_features(n, d, torch.device("cpu"))
    found = label(x, k1=K1)[0]
    assert torch.equal(pseudo_labels(x, k1=K1), torch.as_tensor(found))
    benchmark.group = f"label step trained, N={n} D={d} k1={K1}, {DEVICE.type}"
    benchmark.pedantic(label, args=(x,), kwargs={"k1": K1}, rounds=1)
    benchmark.extra_info["clusters"] = int(found.max()) + 1

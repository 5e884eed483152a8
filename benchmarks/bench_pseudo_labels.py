# SPDX-License-Identifier: Apache-2.0
"""Everything after the neighbour search, lists to labels: against the published algorithm, and up to a million rows.

    pytest benchmarks/bench_pseudo_labels.py --benchmark-only -k market1501
    pytest benchmarks/bench_pseudo_labels.py --benchmark-only -k million

The published algorithm is ``fastreid_u/reference`` (loops over rows, dense matrices, inverted lists) and scikit-learn's
DBSCAN, on one thread. It runs once, in the same process, and must give the
same labels before anything is timed; its seconds and the ratio stand in ``extra_info``. Sizes past its reach get their
lists from a generator that searches within blocks of rows; no list leaves its block, so a block is a problem of its
own, on which the reference must agree.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN
from torch import Tensor

from fastreid_u import _env
from fastreid_u.ops._dispatch import missing
from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.reference.jaccard import jaccard_distance

WITH_PUBLISHED = {"small": (2_000, 256), "5k": (5_000, 2048), "market1501": (12_936, 2048)}
BLOCKWISE = {"100k": 100_000, "million": 1_000_000}
WIDTH, BLOCK = 64, 4_000
K1, LATENT, CAMERAS = 30, 64, 6


def features(n: int, d: int, generator: torch.Generator) -> Tensor:
    """(n, d) unit features, identity by identity: lognormal sizes around 17, a shift per camera, one outlier in ten."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = torch.exp(2.6 + 0.7 * normal(n)).clamp(min=1).long()
    identity = torch.arange(n).repeat_interleave(size)[:n]
    camera = torch.randint(CAMERAS, (n,), generator=generator)
    latent = normal(int(identity.max()) + 1, LATENT)[identity] + 0.35 * normal(CAMERAS, LATENT)[camera]
    latent += 0.7 * normal(n, LATENT)
    outlier = torch.rand(n, generator=generator) < 0.1
    latent[outlier] = 1.2 * normal(int(outlier.sum()), LATENT)
    spread = normal(LATENT, d) / LATENT**0.5 if d != LATENT else torch.eye(d)
    return F.normalize(latent @ spread / LATENT**0.5 + 0.2 / d**0.5 * normal(n, d))


def blockwise(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, neighbour lists that stay within blocks of rows, and the block of each row; rows are shuffled."""
    generator = torch.Generator().manual_seed(0)
    x, index = torch.empty(n, WIDTH), torch.empty(n, K1, dtype=torch.int64)
    place = torch.randperm(n, generator=generator)  # where a row goes
    for start in range(0, n, BLOCK):
        part = features(min(BLOCK, n - start), WIDTH, generator)
        rows = place[start : start + BLOCK]
        x[rows], index[rows] = part, rows[knn(part, K1)[1]]
    block = torch.empty(n, dtype=torch.int64)
    block[place] = torch.arange(n) // BLOCK
    return x, index, block


def labels_from(x: Tensor, index: Tensor, backend: str) -> Tensor:
    unread = torch.zeros(()).expand(index.shape)  # distances are measured again, for all members and not only the k1
    return pseudo_labels(x, k1=K1, knn=(unread, index), backend=backend)


def published(x: Tensor, index: Tensor) -> tuple[Tensor, float]:
    """Labels and seconds on one thread: the dense distance, then scikit-learn, as the training scripts do it."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    distance = jaccard_distance(x, K1, knn=(index, index))
    labels = torch.from_numpy(DBSCAN(eps=0.6, min_samples=4, metric="precomputed").fit_predict(distance.numpy()))
    seconds = time.perf_counter() - begin
    torch.set_num_threads(usual)
    return labels, seconds


def megabytes(entry: str) -> float:
    """An entry of this process's memory statistics: VmRSS, what is resident; VmHWM, the most since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{entry}:")[1].split()[0]) / 1024


def with_peak(run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The result; resident memory that it took beyond what was there, the most of the process, and processor time."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, begin = megabytes("VmRSS"), time.process_time()
    result = run()
    seconds, peak = time.process_time() - begin, megabytes("VmHWM")
    return result, {"extra_mb": round(peak - before), "peak_rss_mb": round(peak), "cpu_seconds": round(seconds, 3)}


def renumbered(labels: Tensor) -> Tensor:
    """Labels of a part of the rows as if there were no others: the order of clusters stays."""
    kept = labels.clone()
    kept[labels >= 0] = labels[labels >= 0].unique(return_inverse=True)[1]
    return kept


@pytest.mark.benchmark(group="pseudo_labels after knn")
@pytest.mark.parametrize("size", WITH_PUBLISHED)
def bench_against_published(benchmark, size: str) -> None:
    n, d = WITH_PUBLISHED[size]
    x = features(n, d, torch.Generator().manual_seed(0))
    index = knn(x, K1)[1]
    expected, seconds = published(x, index)
    labels_from(x[:100], index[:100] % 100, "cpp")  # compiled before memory is looked at
    labels, memory = with_peak(lambda: labels_from(x, index, "cpp"))
    assert torch.equal(labels, expected)
    benchmark.pedantic(labels_from, (x, index, "cpp"), rounds=5)
    benchmark.extra_info |= memory | {
        "n": n,
        "d": d,
        "threads": torch.get_num_threads(),
        "clusters": int(labels.max()) + 1,
        "noise": round(float((labels < 0).float().mean()), 3),
        "published_seconds": round(seconds, 3),
        "ratio": round(seconds / benchmark.stats.stats.median, 1) if benchmark.stats else None,
    }
    print(benchmark.extra_info)


@pytest.mark.benchmark(group="pseudo_labels after knn")
@pytest.mark.parametrize("size", BLOCKWISE)
def bench_large(benchmark, size: str) -> None:
    n = BLOCKWISE[size]
    x, index, block = blockwise(n)
    expected = {}
    for b in (0, n // BLOCK // 2):
        rows = (block == b).nonzero().flatten()
        alone = x[rows], torch.searchsorted(rows, index[rows])
        expected[b] = published(*alone)[0]
        assert torch.equal(labels_from(*alone, "cpp"), expected[b])
    labels, memory = benchmark.pedantic(with_peak, (lambda: labels_from(x, index, "cpp"),), rounds=1)
    for b, part in expected.items():
        assert torch.equal(renumbered(labels[block == b]), part)
    benchmark.extra_info |= memory | {
        "n": n,
        "d": WIDTH,
        "threads": torch.get_num_threads(),
        "clusters": int(labels.max()) + 1,
        "noise": round(float((labels < 0).float().mean()), 3),
    }
    print(benchmark.extra_info)


@pytest.mark.benchmark(group="pseudo_labels after knn, on a GPU")
@pytest.mark.parametrize("name", ["cuda", "cupy", "triton"])
@pytest.mark.parametrize("size", WITH_PUBLISHED)
def bench_on_a_gpu(benchmark, size: str, name: str) -> None:
    """Without a graph in CUDA, by nvcc or by CuPy, and by Triton's graph; labels equal to the CPU's first."""
    if not _env.gpu().present or (name != "triton" and missing(name)):
        pytest.skip(_env.gpu().detail if not _env.gpu().present else missing(name))
    n, d = WITH_PUBLISHED[size]
    x = features(n, d, torch.Generator().manual_seed(0))
    index = knn(x, K1)[1]
    expected = labels_from(x, index, "cpp")
    on_gpu = x.cuda(), index.cuda(), name

    def run() -> Tensor:
        labels = labels_from(*on_gpu)
        torch.cuda.synchronize()
        return labels

    assert torch.equal(run().cpu(), expected)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    extra = torch.cuda.max_memory_allocated() - before
    benchmark(run)
    benchmark.extra_info |= {"n": n, "d": d, "extra_mb": round(extra / 2**20), "clusters": int(expected.max()) + 1}

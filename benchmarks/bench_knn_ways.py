# SPDX-License-Identifier: Apache-2.0
"""The ways of the Triton search beside each other: whole rows, short ones of each width, a hint, and what it chooses.

    pytest benchmarks/bench_knn_ways.py --benchmark-only -k msmt17

All ways must find the same indices, and the plain one those of the reference on sampled rows, before they are timed.
``extra_info`` counts the work: operations of the products, rows measured in float64 for each row, rows left open.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.reference.knn import knn as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
K, SAMPLED = 30, 256
SIZES = {"tiny": (40, 96)}
if DEVICE.type == "cuda":
    SIZES |= {"market1501": (12_936, 2048), "msmt17": (32_621, 2048), "100k": (100_000, 2048), "1M": (1_000_000, 2048)}
WAYS = ("plain", "64", "128", "256", "64 hinted", "256 hinted", "chosen", "chosen hinted")


def flat(n, d, device):
    """Identities of 17 rows, in as many directions as there are: no few of them tell rows apart."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n // 17 + 1, d, generator=generator, device=device).repeat_interleave(17, dim=0)[:n]
    for rows in x.split(8192):
        rows.add_(torch.randn(len(rows), d, generator=generator, device=device), alpha=0.8)
        F.normalize(rows, out=rows)
    return x


@pytest.fixture(scope="module", params=[(size, kind) for size in SIZES for kind in ("spectrum", "flat")], ids="-".join)
def workload(request, reid_features):
    if not RUNS:
        pytest.skip("the Triton search needs a GPU")
    from fastreid_u.kernels.knn import measure, plain

    size, kind = request.param
    n, d = SIZES[size]
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * n * d:
        pytest.skip(f"{n} x {d} needs {12 * n * d / 1e9:.0f} GB of free GPU memory")
    x = reid_features(n, d, DEVICE) if kind == "spectrum" else flat(n, d, DEVICE)
    out = torch.empty(n, K, device=DEVICE), torch.empty(n, K, dtype=torch.int64, device=DEVICE)
    measure.against_all(x, x, plain.search(x, x, None, True, *out), True, *out)
    rows = torch.arange(0, n, max(1, n // SAMPLED), device=DEVICE)
    assert torch.equal(out[1][rows, 1:], others(reference(x[rows], K + 1, gallery=x)[1], rows))
    return size, kind, x, out[1]


def others(index, row):
    """The first K - 1 of each row that are not the row itself."""
    order = (index == row[:, None]).int().argsort(dim=1, stable=True)
    return index.gather(1, order)[:, : K - 1]


@pytest.mark.parametrize("way", WAYS)
def bench_knn_ways(benchmark, workload, way, monkeypatch, peak_bytes):
    from fastreid_u.kernels import knn
    from fastreid_u.kernels.knn import cascade, plain, plan, short_rows

    size, kind, x, neighbours = workload
    (n, d), (name, *hinted) = x.shape, way.split()
    counted = {"rows measured": 0, "left open": 0, "width": d}
    search, choose = cascade.search, knn.choose

    def chosen(x, y, k, hint):
        if name == "plain":
            return None
        if name != "chosen":
            return plan.Plan(short_rows.short_rows(y, int(name), *torch.aminmax(y, dim=0)), hint is not None)
        return choose(x, y, k, hint)

    def counts(candidates):
        def made(*args):
            place, count = candidates(*args)
            counted["rows measured"] += int(count[count <= place.shape[1]].sum())
            return place, count

        return made

    def counts_open(x, y, short, alone, hint, *out):
        rows = search(x, y, short, alone, hint, *out)
        counted["left open"] += len(rows)
        counted["width"] = short.width
        counted["rows measured"] += n * (cascade.guesses(K) if hint is None else hint.shape[1])
        return rows

    def timed():
        found = knn.knn(x, K, hint=neighbours if hinted else None)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return found

    with monkeypatch.context() as counting:
        counting.setattr(knn, "choose", chosen)
        counting.setattr(cascade, "_candidates", counts(cascade._candidates))
        counting.setattr(plain._Search, "candidates", counts(plain._Search.candidates))
        counting.setattr(cascade, "search", counts_open)
        found, peak = peak_bytes(timed, DEVICE)
    assert torch.equal(found[1], neighbours)
    del found

    monkeypatch.setattr(knn, "choose", chosen)
    width, left = counted["width"], counted["left open"]
    guess = 0 if width == d or hinted else cascade.GUESSED
    flop = 2 * n * n * (width + guess) + 2 * left * n * d * (width != d)
    benchmark.group = f"ways of knn {size} {kind}, N={n} D={d} k={K}, {DEVICE.type}"
    benchmark.extra_info |= {
        "width": width,
        "flop of products": flop,
        "share of plain flop": round(flop / (2 * n * n * d), 4),
        "measured for each row": round(counted["rows measured"] / n, 1),
        "left open": left,
        "peak_bytes": peak,
    }
    benchmark.pedantic(timed, rounds=3 if DEVICE.type == "cuda" else 1)

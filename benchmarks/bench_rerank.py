# SPDX-License-Identifier: Apache-2.0
"""Re-ranking from features, against the published algorithm on ready distances, which is spared computing them.

    pytest benchmarks/bench_rerank.py --benchmark-only -k 10k

At sizes within its reach the published algorithm (``fastreid_u/reference``) must give the same distances before
anything is timed. Past it, a GPU must agree with a CPU at the size of Market-1501; a CPU stands on the smaller sizes.
"""

import pytest
import torch

from fastreid_u.ops.rerank import rerank
from fastreid_u.reference.rerank import rerank as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"tiny": (40, 160, 32), "10k": (2_000, 8_000, 2048), "market1501": (3_368, 15_913, 2048)}
if DEVICE.type == "cuda":
    SIZES |= {"msmt17": (11_659, 82_161, 2048)}
SLOW = 12_936  # images up to which the published algorithm runs
TOP = 100


@pytest.fixture(scope="module", params=SIZES)
def workload(request, reid_features):
    q, g, d = SIZES[request.param]
    x = reid_features(q + g, d, DEVICE)
    x = x[torch.randperm(q + g, generator=torch.Generator().manual_seed(0)).to(DEVICE)]
    return request.param, x[:q], x[q:]


def squared(a, b):
    """What published evaluators pass in, in float64 and rounded once."""
    a, b = a.double(), b.double()
    sq_dist = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * (a @ b.T)
    return sq_dist.clamp_(min=0).float()


@pytest.fixture(scope="module")
def published(workload):
    """The published distances on this workload, and the matrices that they come from; None past their reach."""
    _, query, gallery = workload
    if len(query) + len(gallery) > SLOW:
        return None
    distmats = squared(query, gallery), squared(query, query), squared(gallery, gallery)
    return distmats, reference(None, None, distmats=distmats)


@pytest.mark.parametrize("name", ["dense", "top", "distmats", "published"])
def bench_rerank(benchmark, workload, published, name, peak_bytes, ceilings):
    size, query, gallery = workload
    (q, d), g = query.shape, len(gallery)
    if name in ("distmats", "published") and published is None:
        pytest.skip(f"matrices of all pairs, and what was published, only up to {SLOW} images")
    runs = {
        "dense": lambda: rerank(query, gallery),
        "top": lambda: rerank(query, gallery, top=TOP),
        "distmats": lambda: rerank(None, None, distmats=published[0]),
        "published": lambda: reference(None, None, distmats=published[0]),
    }

    def timed():
        found = runs[name]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return found

    found, peak = peak_bytes(timed, DEVICE)
    if published is not None:
        expected = published[1].sort(dim=1).values[:, :TOP] if name == "top" else published[1]
        torch.testing.assert_close(found[0] if name == "top" else found, expected, atol=4e-6, rtol=0)
    elif DEVICE.type == "cuda" and g <= 20_000:
        distance = rerank(query.cpu(), gallery.cpu(), top=TOP)[0]
        ours = found[0] if name == "top" else found.sort(dim=1).values[:, :TOP]
        torch.testing.assert_close(ours.cpu(), distance, atol=1e-6, rtol=0)
    del found

    n = q + g
    benchmark.group = f"rerank {size}, Q={q} G={g} D={d}, {DEVICE.type}"
    # neighbours over all images, the largest of each column from half of all pairs, queries against the gallery
    flop = {"search": 2 * n * n * d, "float64": (n * n + 2 * q * g) * d}
    benchmark.extra_info |= {
        "flop": 0 if name in ("distmats", "published") else flop["search"] + flop["float64"],
        "bytes": 12 * q * TOP if name == "top" else 4 * q * g,
        "peak_bytes": peak,
        "bytes of all pairs": 4 * n * n,
    }
    benchmark.pedantic(timed, rounds=1 if name == "published" or n > 5_000 else 5)
    if name in ("dense", "top") and {"fp16 TFLOP/s", "fp64 TFLOP/s"} <= set(ceilings) and benchmark.stats:
        floor = flop["search"] / ceilings["fp16 TFLOP/s"] + flop["float64"] / ceilings["fp64 TFLOP/s"]
        benchmark.extra_info["share of roofline"] = floor / benchmark.stats.stats.median

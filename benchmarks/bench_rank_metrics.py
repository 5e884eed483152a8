# SPDX-License-Identifier: Apache-2.0
"""Retrieval scores from features, beside an evaluation that sorts the gallery for each query.

    pytest benchmarks/bench_rank_metrics.py --benchmark-only -k market1501

"argsort" is the float32 product, ``np.argsort`` of each row and the loop over queries, whose parts are in NumPy; the
published loops, which go through each list in Python as well, are slower. Before anything is timed it must give the
same mAP up to the rounding of its distances, and at the smallest size the reference must agree to 1e-12.
"""

import numpy as np
import pytest
import torch

from fastreid_u.ops.rank_metrics import rank_metrics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "tiny": (40, 160, 32), "market1501": (3_368, 19_732, 2048), "market1501-512": (3_368, 19_732, 512),
    "msmt17": (11_659, 82_161, 512),
}  # fmt: skip
SLOW = 2**27  # pairs up to which the argsort evaluation runs, which holds several numbers of each
RUNS = ["features", "details", "argsort", "reference"]


@pytest.fixture(scope="module", params=SIZES)
def workload(request, reid_features):
    """Features of people in six cameras, a tight cluster for each person; with identities and cameras."""
    q, g, d = SIZES[request.param]
    x = reid_features(q + g, d, DEVICE)
    generator = torch.Generator().manual_seed(1)
    pids, camids = (torch.randint(most, (q + g,), generator=generator) for most in ((q + g) // 17 + 1, 6))
    centre = x[: int(pids.max()) + 1].clone()
    for rows, ids in zip(x.split(8192), pids.split(8192), strict=True):
        rows.add_(centre[ids.to(DEVICE)], alpha=1.5)
        rows.div_(rows.norm(dim=1, keepdim=True))
    return request.param, (x[:q], x[q:], pids[:q], pids[q:], camids[:q], camids[q:])


def by_argsort(query, gallery, q_pids, g_pids, q_camids, g_camids):
    """mAP, top-1 and mINP."""
    q_pids, g_pids, q_camids, g_camids = (x.numpy() for x in (q_pids, g_pids, q_camids, g_camids))
    distance = (2 - 2 * (query @ gallery.T)).cpu().numpy()
    order = np.argsort(distance, axis=1)
    matches = (g_pids[order] == q_pids[:, None]).astype(np.int32)
    found = []
    for i, row in enumerate(order):
        kept = (g_pids[row] != q_pids[i]) | (g_camids[row] != q_camids[i])
        match = matches[i][kept]
        if match.any():
            hits, last = match.cumsum(), match.nonzero()[0][-1] + 1
            precision = hits / (np.arange(len(hits)) + 1.0) * match
            found.append((precision.sum() / match.sum(), match[0], hits[-1] / last))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("name", RUNS)
def bench_rank_metrics(benchmark, workload, name, peak_bytes):
    size, arguments = workload
    (q, d), g = arguments[0].shape, len(arguments[1])
    if name == "argsort" and q * g > SLOW:
        pytest.skip(f"a sorted matrix of all pairs only up to {SLOW} of them")
    if name == "reference" and size != "tiny" and q * g > SLOW:
        pytest.skip(f"the reference only up to {SLOW} pairs")
    runs = {
        "features": lambda: rank_metrics(*arguments),
        "details": lambda: rank_metrics(*arguments, fpr=[1e-4, 1e-3, 1e-2], by_camera=True, top=10),
        "argsort": lambda: by_argsort(*arguments),
        "reference": lambda: rank_metrics(*arguments, backend="reference"),
    }
    found, peak = peak_bytes(runs[name], DEVICE)
    if name in ("features", "details") and q * g <= SLOW:
        wanted = by_argsort(*arguments)
        assert np.abs(np.array([found.mAP, found.top(1), found.mINP]) - wanted).max() < 1e-4
    if size == "tiny" and name in ("features", "details"):
        torch.testing.assert_close(found.ap, rank_metrics(*arguments, backend="reference").ap, atol=1e-12, rtol=0)
    benchmark.group = f"rank_metrics {size}, Q={q} G={g} D={d}, {DEVICE.type}"
    benchmark.extra_info |= {"flop": 2 * q * g * d, "bytes": 4 * (q + g) * d, "peak_bytes": peak}
    rounds = 1 if name == "reference" or q * g > SLOW else 3 if name == "argsort" else 7
    benchmark.pedantic(runs[name], rounds=rounds)

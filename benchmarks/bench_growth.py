# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with the rows: the search and the whole label step on 256 numbers of a trained network.

    pytest benchmarks/bench_growth.py --benchmark-only

More rows are more people (trained_features.py). Neighbours equal the reference on sampled rows before anything is
timed, and labels, where it can run, those of the published pipeline (``published/``). ``cpu_report.py`` fits the
exponents: time or memory in proportion to N ** exponent.
"""

import numpy as np
import pytest
import torch
from published.label import label
from rivals import why_not

from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.reference.knn import knn as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D, K, SAMPLED, PUBLISHED_TO = 256, 30, 128, 5_000
ROWS = (5_000, 10_000, 20_000, 50_000)


def search(x):
    return knn(x, K)


def labels(x):
    return pseudo_labels(x, k1=K)


def require_neighbours(found, x):
    rows = torch.arange(0, len(x), len(x) // SAMPLED, device=x.device)
    expected = reference(x[rows], K, gallery=x)
    assert torch.equal(found[1][rows], expected[1])
    torch.testing.assert_close(found[0][rows], expected[0], rtol=1.2e-7, atol=0)


def require_labels(found, x):
    if len(x) <= PUBLISHED_TO and why_not("faiss") is None:
        np.testing.assert_array_equal(found.cpu().numpy(), label(x.cpu(), k1=K)[0])


STEPS = {"search": (search, require_neighbours), "label step": (labels, require_labels)}


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("name", STEPS)
def bench_growth(benchmark, name, n, trained_features, peak_bytes):
    x = trained_features(n, D, DEVICE)
    step, require_equal = STEPS[name]

    def timed():
        found = step(x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return found

    require_equal(step(x), x)  # and compiles, before memory is looked at
    _, peak = peak_bytes(timed, DEVICE)
    benchmark.group = f"growth, {name}, D={D} k={K}, {DEVICE.type}"
    benchmark.pedantic(timed, rounds=5 if n <= 10_000 else 2)
    benchmark.extra_info |= {"step": name, "rows": n, "bytes": x.nbytes, "peak_bytes": peak}

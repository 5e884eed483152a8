# SPDX-License-Identifier: Apache-2.0
"""From neighbour lists to distances: the sparse graph against the dense definition in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
from fastreid_u.ops.knn import knn

POINTS, WIDTH, RADIUS = 1000, 256, 0.6


@pytest.fixture(scope="module")
def workload():
    """Features of 60 identities and their neighbour lists; the search is not timed."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(60, WIDTH, generator=generator)
    identity = torch.randint(60, (POINTS,), generator=generator)
    x = F.normalize(centre[identity] + 0.8 * torch.randn(POINTS, WIDTH, generator=generator))
    return x, knn(x, 30)


def dense(x, neighbours):
    """All pairs from the dense encoding, a row at a time so that it fits."""
    v = k_reciprocal_encoding(x, knn=neighbours).to_dense()
    mass = torch.stack([torch.minimum(row, v).sum(1) for row in v])
    return 1 - mass / (2 - mass)


def graph(x, neighbours):
    return jaccard_graph(x, radius=RADIUS, knn=neighbours)


@pytest.mark.benchmark(group=f"jaccard N={POINTS}")
@pytest.mark.parametrize("rival", [graph, dense], ids=["fastreid_u", "dense torch"])
def bench_jaccard(benchmark, workload, rival):
    x, neighbours = workload
    stored, everything = graph(x, neighbours), dense(x, neighbours)
    row = torch.arange(POINTS).repeat_interleave(stored.crow_indices().diff())
    torch.testing.assert_close(stored.values(), everything[row, stored.col_indices()].clamp(min=0), atol=2e-6, rtol=0)
    assert (everything <= RADIUS - 2e-6).sum() <= stored.values().numel() <= (everything <= RADIUS + 2e-6).sum()
    benchmark.pedantic(rival, args=workload, rounds=3, warmup_rounds=1)

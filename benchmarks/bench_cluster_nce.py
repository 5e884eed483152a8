# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss, forward and backward, against the same written out in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.cluster_nce import cluster_nce

BATCH, CLUSTERS, WIDTH, TEMPERATURE = 256, 700, 2048, 0.05


@pytest.fixture(scope="module")
def workload():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, WIDTH, generator=generator, requires_grad=True)
    memory = F.normalize(torch.randn(CLUSTERS, WIDTH, generator=generator))
    return x, torch.randint(CLUSTERS, (BATCH,), generator=generator), memory


def plain(x, targets, memory):
    return F.cross_entropy(F.normalize(x) @ memory.T / TEMPERATURE, targets)


def ours(x, targets, memory):
    return cluster_nce(x, targets, memory, temperature=TEMPERATURE)


def step(loss, x, targets, memory):
    value = loss(x, targets, memory)
    return value.detach(), *torch.autograd.grad(value, x)


@pytest.mark.benchmark(group=f"cluster_nce B={BATCH} C={CLUSTERS} D={WIDTH}")
@pytest.mark.parametrize("rival", [ours, plain], ids=["fastreid_u", "plain torch"])
def bench_cluster_nce(benchmark, workload, rival):
    for found, expected in zip(step(ours, *workload), step(plain, *workload), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
    benchmark(step, rival, *workload)

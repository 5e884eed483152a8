# SPDX-License-Identifier: Apache-2.0
"""The memory update against the loop over samples as published code writes it."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.momentum_update import momentum_update_

BATCH, CLUSTERS, WIDTH, MOMENTUM = 256, 700, 2048, 0.1


@pytest.fixture(scope="module")
def workload():
    """A P x K batch: 16 clusters of 16 samples each."""
    generator = torch.Generator().manual_seed(0)
    memory = F.normalize(torch.randn(CLUSTERS, WIDTH, generator=generator))
    x = F.normalize(torch.randn(BATCH, WIDTH, generator=generator))
    return memory, x, torch.randperm(CLUSTERS, generator=generator)[:16].repeat_interleave(16)


def ours(memory, x, targets):
    return momentum_update_(memory, x, targets, momentum=MOMENTUM)


def loop(memory, x, targets):
    for sample, row in zip(x, targets.tolist(), strict=True):
        memory[row] = MOMENTUM * memory[row] + (1 - MOMENTUM) * sample
        memory[row] /= memory[row].norm()
    return memory


@pytest.mark.benchmark(group=f"momentum_update B={BATCH} C={CLUSTERS} D={WIDTH}")
@pytest.mark.parametrize("rival", [ours, loop], ids=["fastreid_u", "plain torch"])
def bench_momentum_update(benchmark, workload, rival):
    memory, x, targets = workload
    torch.testing.assert_close(ours(memory.clone(), x, targets), loop(memory.clone(), x, targets), atol=1e-6, rtol=0)
    benchmark(rival, memory.clone(), x, targets)

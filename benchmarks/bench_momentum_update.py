# SPDX-License-Identifier: Apache-2.0
"""The memory update against the published loop over samples and against the best that plain torch can do."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.momentum_update import momentum_update_
from fastreid_u.reference.momentum_update import momentum_update_ as published_loop

CLUSTERS, WIDTH, MOMENTUM = 700, 2048, 0.1
PEOPLE, EACH = 16, 16  # a P x K batch
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def workload():
    generator = torch.Generator().manual_seed(0)
    memory = F.normalize(torch.randn(CLUSTERS, WIDTH, generator=generator))
    x = torch.randn(PEOPLE * EACH, WIDTH, generator=generator)
    targets = torch.randperm(CLUSTERS, generator=generator)[:PEOPLE].repeat_interleave(EACH)
    return memory.to(DEVICE), x.to(DEVICE), targets.to(DEVICE)


def ours(memory, x, targets):
    return momentum_update_(memory, x, targets, momentum=MOMENTUM)


def loop(memory, x, targets):
    return published_loop(memory, x, targets, momentum=MOMENTUM)


@torch.no_grad()
def grouped(memory, x, targets):
    """All people at once, sample after sample; it may, because it is told that the batch is P x K."""
    people = targets[::EACH]
    rows = memory[people]
    for sample in F.normalize(x, dim=1).view(PEOPLE, EACH, -1).unbind(1):
        rows = F.normalize(MOMENTUM * rows + (1 - MOMENTUM) * sample, dim=1)
    memory[people] = rows
    return memory


RIVALS = {
    "fastreid_u": ours,
    "published loop": loop,
    "grouped torch": grouped,
    "grouped torch.compile": torch.compile(grouped),
}


@pytest.mark.benchmark(group=f"momentum_update B={PEOPLE * EACH} C={CLUSTERS} D={WIDTH}")
@pytest.mark.parametrize("name", RIVALS)
def bench_momentum_update(benchmark, workload, name):
    memory, x, targets = workload
    truth = published_loop(memory.double(), x.double(), targets, momentum=MOMENTUM)
    moved = RIVALS[name](memory.clone(), x, targets)
    torch.testing.assert_close(moved.double(), truth, atol=1e-6, rtol=0)
    benchmark.extra_info["bytes"] = x.nbytes + targets.nbytes + 2 * PEOPLE * memory[0].nbytes
    benchmark.extra_info["max_error"] = (moved.double() - truth).abs().max().item()

    def run():
        RIVALS[name](moved, x, targets)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)

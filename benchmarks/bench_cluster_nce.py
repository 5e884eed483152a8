# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss and its gradient against the same written out in plain torch, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.reference.cluster_nce import cluster_nce as reference

TEMPERATURE = 0.05
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Samples, clusters, width: Market-1501 with a ResNet; what a CPU need not be asked for.
SIZES = [(256, 700, 2048)]
if DEVICE.type == "cuda":
    SIZES += [(256, 10_000, 2048), (256, 50_000, 2048), (256, 1_000_000, 384)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "x".join(map(str, size)))
def workload(request):
    b, c, d = request.param
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, d, generator=generator).to(DEVICE).requires_grad_()
    memory = F.normalize(torch.randn(c, d, generator=generator).to(DEVICE))
    return x, torch.randint(c, (b,), generator=generator).to(DEVICE), memory


def ours(x, targets, memory):
    return cluster_nce(x, targets, memory, temperature=TEMPERATURE)


def plain(x, targets, memory):
    return F.cross_entropy(F.normalize(x) @ memory.T / TEMPERATURE, targets)


def step(loss, x, targets, memory):
    value = loss(x, targets, memory)
    found = value.detach(), *torch.autograd.grad(value, x)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return found


RIVALS = {"fastreid_u": ours, "torch": plain, "torch.compile": torch.compile(plain)}


@pytest.mark.parametrize("name", RIVALS)
def bench_cluster_nce(benchmark, workload, name):
    x, _, memory = workload
    (b, d), c = x.shape, len(memory)
    benchmark.group = f"cluster_nce, loss and gradient, B={b} C={c} D={d}"
    truth = step(lambda x, y, m: reference(x, y, m.double(), temperature=TEMPERATURE), *workload)
    for found, expected in zip(step(RIVALS[name], *workload), truth, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-6)
    # the floor: the memory twice, the features twice, the gradient once
    benchmark.extra_info["bytes"] = 2 * memory.nbytes + 3 * x.nbytes
    benchmark.extra_info["flop"] = 4 * b * c * d
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(RIVALS[name], *workload)
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    benchmark(step, RIVALS[name], *workload)

# SPDX-License-Identifier: Apache-2.0
"""The loss over proxies and its gradient against the published loop and plain torch, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.proxy_nce import proxy_nce
from fastreid_u.reference.proxy_nce import proxy_nce as reference

TEMPERATURE, HARD, WIDTH, CAMERAS = 0.07, 50, 2048, 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Samples and proxies: CAP on Market-1501 has about 3,300; what a CPU need not be asked for.
SIZES = [(64, 3300), (256, 3300)]
if DEVICE.type == "cuda":
    SIZES += [(64, 2000), (256, 20_000), (1024, 3300), (1024, 20_000)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "x".join(map(str, size)))
def workload(request):
    b, q = request.param
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(CAMERAS), torch.arange(q // CAMERAS))
    memory = F.normalize(torch.randn(len(pairs), WIDTH, generator=generator))
    of_sample = torch.randint(len(pairs), (b,), generator=generator)
    x = memory[of_sample] + 0.02 * torch.randn(b, WIDTH, generator=generator)
    rest = pairs[of_sample, 1], pairs[of_sample, 0], memory, pairs[:, 1], pairs[:, 0]
    return x.to(DEVICE).requires_grad_(), *(each.contiguous().to(DEVICE) for each in rest)


def ours(*batch):
    return proxy_nce(*batch, temperature=TEMPERATURE, hard_negatives=HARD, reduction="camera")


def plain(x, clusters, cameras, memory, proxy_clusters, proxy_cameras):
    logits = F.normalize(x) @ memory.T / TEMPERATURE
    positive = clusters[:, None] == proxy_clusters
    hardest = logits.masked_fill(positive, -torch.inf).topk(HARD, sorted=False).values
    total = torch.cat([logits.masked_fill(~positive, -torch.inf), hardest], dim=1).logsumexp(dim=1)
    each = total - (logits * positive).sum(dim=1) / positive.sum(dim=1)
    return (each / (cameras[:, None] == cameras).sum(dim=1)).sum()


def published_loop(x, clusters, cameras, memory, proxy_clusters, proxy_cameras):
    """Camera by camera, sample by sample, each with a whole sort, as CAP and ICE do."""
    similarity = F.normalize(x) @ memory.T
    loss = 0.0
    for camera in cameras.unique():
        members = (cameras == camera).nonzero().flatten()
        for i in members:
            positive = (proxy_clusters == clusters[i]).nonzero().flatten()
            ranked = similarity[i].detach().clone()
            ranked[positive] = -10000
            negative = ranked.sort().indices[-HARD:]
            logits = torch.cat([similarity[i, positive], similarity[i, negative]]) / TEMPERATURE
            loss = loss - logits.log_softmax(dim=0)[: len(positive)].mean() / len(members)
    return loss


def step(loss, *batch):
    value = loss(*batch)
    found = value.detach(), *torch.autograd.grad(value, batch[0])
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return found


RIVALS = {"fastreid_u": ours, "torch": plain, "torch.compile": torch.compile(plain), "published loop": published_loop}


@pytest.mark.parametrize("name", RIVALS)
def bench_proxy_nce(benchmark, workload, name):
    x, _, _, memory, *_ = workload
    b, q = len(x), len(memory)
    benchmark.group = f"proxy_nce, loss and gradient, B={b} Q={q} D={WIDTH} k={HARD}"
    settings = {"temperature": TEMPERATURE, "hard_negatives": HARD, "reduction": "camera"}
    truth = step(lambda x, y, a, m, *rest: reference(x, y, a, m.double(), *rest, **settings), *workload)
    for found, expected in zip(step(RIVALS[name], *workload), truth, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-6)
    # the floor: the memory once, the rows of positives and negatives once a sample, features in and gradient out
    rows = HARD + CAMERAS
    benchmark.extra_info["bytes"] = memory.nbytes + 4 * b * rows * WIDTH + 3 * x.nbytes
    benchmark.extra_info["flop"] = 2 * b * q * WIDTH + 2 * b * rows * WIDTH
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(RIVALS[name], *workload)
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    benchmark(step, RIVALS[name], *workload)

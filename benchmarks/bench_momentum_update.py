# SPDX-License-Identifier: Apache-2.0
"""The memory update by every rule against the published loop and against the best that plain torch can do."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.momentum_update import RULES, momentum_update_
from fastreid_u.reference.momentum_update import momentum_update_ as published_loop

CLUSTERS, MOMENTUM, TEMPERATURE, PUSH = 700, 0.1, 0.07, 0.2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# People and samples of each, width of a row: a P x K batch. Every rule on the published 16 x 16 of a ResNet-50, the
# sequential one over batches of 64 to 1024 and the widths of vision transformers.
PUBLISHED = (16, 16, 2048)
SIZES = [(16, 4, 384), (16, 4, 768), (16, 4, 2048), (16, 16, 384), (16, 16, 768), (64, 16, 384), (64, 16, 2048)]
CASES = [(rule, *PUBLISHED) for rule in RULES] + [("sequential", *size) for size in SIZES]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def workload(request):
    rule, people, each, width = request.param
    generator = torch.Generator().manual_seed(0)
    memory = F.normalize(torch.randn(CLUSTERS, width, generator=generator))
    targets = torch.randperm(CLUSTERS, generator=generator)[:people].repeat_interleave(each)
    # unlike noise, samples of a person resemble their row, so that no choice among them hangs on a rounding
    x = memory[targets] + torch.rand(len(targets), 1, generator=generator) * F.normalize(
        torch.randn(len(targets), width, generator=generator)
    )
    settings = {}
    if rule == "weighted":
        settings["weight_temperature"] = TEMPERATURE
    if rule == "index":
        settings["index"] = torch.full((CLUSTERS,), -1).scatter(0, targets, torch.arange(len(targets)))
    if rule == "row":  # clusters of seven
        labels = torch.arange(CLUSTERS) // 7
        settings |= {"labels": labels, "cluster_sizes": labels.bincount()}
        settings["cluster_means"] = memory.view(-1, 7, width).mean(dim=1)
    tensors = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    batch = memory.to(DEVICE), x.to(DEVICE), targets.to(DEVICE)
    return batch, {"momentum": MOMENTUM, "rule": rule, **tensors}, (people, each, width)


@torch.no_grad()
def grouped(
    memory, x, targets, *, people, each, momentum, rule, weight_temperature=None, index=None,
    labels=None, cluster_sizes=None, cluster_means=None,
):  # fmt: skip
    """All people at once: ``people`` and ``each`` state that the batch is P x K."""
    rows = targets[::each]
    old = memory[rows]
    unit = F.normalize(x, dim=1).view(people, each, -1)
    if rule in ("sequential", "row"):
        new = old
        for sample in unit.unbind(1):
            new = F.normalize(momentum * new + (1 - momentum) * sample, dim=1)
    elif rule == "mean":
        new = F.normalize(momentum * old + (1 - momentum) * unit.mean(dim=1), dim=1)
    elif rule == "index":
        new = F.normalize(momentum * old + (1 - momentum) * unit.flatten(0, 1)[index[rows]], dim=1)
    else:
        similarity = torch.bmm(unit, old[:, :, None])[:, :, 0]
        if rule == "weighted":
            sample = (torch.softmax(-similarity / weight_temperature, dim=1)[:, None] @ unit)[:, 0]
        else:
            lowest, hardest = similarity.min(dim=1)
            sample = unit[torch.arange(people, device=x.device), hardest]
        if rule == "push":
            others = (old @ memory.T).scatter(1, rows[:, None], -torch.inf)
            likeness, nearest = others.max(dim=1, keepdim=True)
            pull = (1 - momentum) * (1 - lowest[:, None]) * (old - sample)
            new = F.normalize(old - pull - PUSH * (1 + likeness) * (old + memory[nearest[:, 0]]), dim=1)
        else:
            new = F.normalize(momentum * old + (1 - momentum) * sample, dim=1)
    memory[rows] = new
    if cluster_means is not None:
        moved = (new - old) / cluster_sizes[labels[rows]][:, None]
        cluster_means.index_add_(0, labels[rows], moved)
    return memory


torch._dynamo.config.recompile_limit = 64  # of 8, the ninth size would be timed uncompiled
RIVALS = {
    "fastreid_u": momentum_update_,
    "published loop": published_loop,
    "grouped torch": grouped,
    "grouped torch.compile": torch.compile(grouped, dynamic=False),
}


@pytest.mark.parametrize("name", RIVALS)
def bench_momentum_update(benchmark, workload, name):
    (memory, x, targets), settings, (people, each, width) = workload
    rule = settings["rule"]
    if "grouped" in name:
        if rule == "push_sequential":
            pytest.skip("rows that wait for each other cannot be grouped")
        settings = settings | {"people": people, "each": each}
    benchmark.group = f"momentum_update {rule} B={people * each} C={CLUSTERS} D={width}"

    def fresh(dtype):
        copies = {k: v.to(dtype, copy=True) if k == "cluster_means" else v for k, v in settings.items()}
        return (memory.to(dtype, copy=True), x.to(dtype), targets), copies

    plain = {k: v for k, v in fresh(torch.float64)[1].items() if k not in ("people", "each")}
    truth = published_loop(*fresh(torch.float64)[0], **plain)
    batch, mine = fresh(torch.float32)
    moved = RIVALS[name](*batch, **mine)
    torch.testing.assert_close(moved.double(), truth, atol=1e-6, rtol=0)
    if rule == "row":
        torch.testing.assert_close(mine["cluster_means"].double(), plain["cluster_means"], atol=1e-6, rtol=0)
    benchmark.extra_info["max_error"] = (moved.double() - truth).abs().max().item()
    # the floor: the samples once, the touched rows in and out; "push" also the memory once
    clusters = 2 if rule == "row" else 1
    benchmark.extra_info["bytes"] = x.nbytes + targets.nbytes + 2 * clusters * people * memory[0].nbytes
    if rule.startswith("push"):
        benchmark.extra_info["bytes"] += memory.nbytes
    run = functools.partial(RIVALS[name], *batch, **mine)
    if DEVICE.type == "cuda":
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        benchmark.extra_info["launches"] = len(kernels)
        benchmark.extra_info["device_us"] = sum(event.device_time for event in kernels)

    def timed():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)

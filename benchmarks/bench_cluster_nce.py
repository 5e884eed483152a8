# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss and its gradient against the same written out in plain torch, eager and compiled.

torch's own ``linear_cross_entropy`` takes part in the form that cuts the batch into pieces, Liger-Kernel and
cut-cross-entropy where they are installed and have a GPU. The last two take class indices only; none has the loss with
an epsilon; all want the features normalised first. Every rival is held to the reference in float64 before it is timed.
A CPU runs the small sizes; ``FASTREID_U_BENCH=all`` asks it for the rest.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from rivals import why_not

from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.reference.cluster_nce import cluster_nce as reference

TEMPERATURE = 0.05
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Samples, clusters, width: Market-1501 with a ResNet, ViTs, a large batch, every image its own class, a million rows.
SMALL = [(256, 700, 2048), (64, 500, 384), (256, 2_000, 768)]
LARGE = [(1024, 2_000, 2048), (64, 10_000, 2048), (256, 10_000, 2048), (256, 50_000, 2048), (256, 1_000_000, 384)]
SIZES = SMALL + (LARGE if DEVICE.type == "cuda" or os.environ.get("FASTREID_U_BENCH") == "all" else [])
VARIANTS = ["plain", "teacher", "epsilon and focal", "extra target"]


def mask_of(c):
    return torch.arange(c, device=DEVICE) % 50 != 49


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "x".join(map(str, size)))
def workload(request):
    b, c, d = request.param
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, d, generator=generator).to(DEVICE).requires_grad_()
    memory = F.normalize(torch.randn(c, d, generator=generator).to(DEVICE))
    targets = (torch.randint(c // 50, (b,), generator=generator) * 50).to(DEVICE)
    teacher = torch.randn(b, d, generator=generator).to(DEVICE)
    return x, targets, memory, teacher


def settings_of(variant, b, c, teacher):
    if variant == "extra target":
        row = torch.linspace(0, 1, c, device=DEVICE).softmax(0)
        return {"extra_target": row.expand(b, c).contiguous(), "extra_weight": 0.5}
    return {
        "plain": {},
        "teacher": {"teacher": teacher, "teacher_weight": 0.1},
        "epsilon and focal": {"epsilon": 1e-6, "focal": 4.0, "class_mask": mask_of(c)},
    }[variant]


def ours(x, targets, memory, **settings):
    return cluster_nce(x, targets, memory, temperature=TEMPERATURE, **settings)


def plain(x, targets, memory, **settings):
    """What one would write in torch."""
    logits = F.normalize(x) @ memory.T / TEMPERATURE
    if "epsilon" in settings:
        e = logits.exp() * settings["class_mask"]
        p = e.gather(1, targets[:, None])[:, 0] / (e.sum(1) + settings["epsilon"])
        return ((1 - p) ** settings["focal"] * -torch.log(p + settings["epsilon"])).mean()
    return F.cross_entropy(logits, wanted(targets, memory, **settings))


def wanted(targets, memory, **settings):
    """Class indices, or the probabilities (B, C) that a teacher or another target makes of them."""
    if not settings:
        return targets
    if "teacher" in settings:
        with torch.no_grad():
            soft = (F.normalize(settings["teacher"]) @ memory.T / TEMPERATURE).softmax(1)
        share = settings["teacher_weight"]
    else:
        soft, share = settings["extra_target"], settings["extra_weight"]
    return F.one_hot(targets, len(memory)) * (1 - share) + share * soft


def in_pieces(x, targets, memory, **settings):
    """torch's own, with the logits of a piece of the batch at a time (torch 2.13 and later)."""
    target = wanted(targets, memory, **settings)
    return F.linear_cross_entropy(
        F.normalize(x), memory / TEMPERATURE, target, options=torch.nn.LinearCrossEntropyOptions()
    )


def liger(x, targets, memory):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(memory / TEMPERATURE, F.normalize(x), targets)


def cut_cross_entropy(x, targets, memory):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(F.normalize(x) / TEMPERATURE, memory, targets)


torch._dynamo.config.recompile_limit = 64  # of 8, the ninth size would be timed uncompiled
RIVALS = {
    "fastreid_u": ours,
    "torch": plain,
    "torch.compile": torch.compile(plain),
    "torch in pieces": in_pieces,
    "liger": liger,
    "cut_cross_entropy": cut_cross_entropy,
}
INDICES_ONLY = ("liger", "cut_cross_entropy")


def step(loss, x, targets, memory, **settings):
    value = loss(x, targets, memory, **settings)
    found = value.detach(), *torch.autograd.grad(value, x)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return found


def launches(run):
    """Kernels that one call puts on the GPU."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RIVALS)
def bench_cluster_nce(benchmark, workload, name, variant):
    x, targets, memory, teacher = workload
    (b, d), c = x.shape, len(memory)
    if name in INDICES_ONLY and variant != "plain":
        pytest.skip(f"{name} takes class indices only")
    if name == "torch in pieces":
        if not hasattr(F, "linear_cross_entropy"):
            pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy: it came with 2.13")
        if variant == "epsilon and focal":
            pytest.skip("linear_cross_entropy has neither an epsilon nor a focal weight")
    if reason := why_not(name):
        pytest.skip(reason)
    if variant != "plain" and c > 50_000:
        pytest.skip("plain torch would take tens of GiB")
    benchmark.group = f"cluster_nce, {variant}, loss and gradient, B={b} C={c} D={d}"
    settings = settings_of(variant, b, c, teacher)

    def run():
        return step(RIVALS[name], x, targets, memory, **settings)

    wide = {key: value.double() if key in ("teacher", "extra_target") else value for key, value in settings.items()}
    truth = step(
        lambda *given, **kw: reference(*given, temperature=TEMPERATURE, **kw), x, targets, memory.double(), **wide
    )
    errors = []
    for found, expected in zip(run(), truth, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-6)
        errors.append((found.double() - expected.double()).abs().max().item())
    benchmark.extra_info["error_loss"], benchmark.extra_info["error_gradient"] = errors
    # the floor: the memory twice, the features twice, the gradient once, what else is given twice
    dense = sum(settings[key].nbytes for key in ("teacher", "extra_target") if key in settings)
    benchmark.extra_info["bytes"] = 2 * memory.nbytes + 3 * x.nbytes + 2 * dense
    benchmark.extra_info["flop"] = (6 if "teacher" in settings else 4) * b * c * d
    if DEVICE.type == "cuda":
        benchmark.extra_info["launches"] = launches(run)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    benchmark(run)
    if DEVICE.type == "cuda":
        benchmark.extra_info["share_of_bandwidth"] = share_of_bandwidth(benchmark)


def share_of_bandwidth(benchmark):
    """Bytes of the floor over the time, as a share of what copying memory reaches on this GPU."""
    from_, to = (torch.empty(2**28, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    to.copy_(from_)
    start.record()
    to.copy_(from_)
    end.record()
    torch.cuda.synchronize()
    copied = 2 * from_.nbytes / (start.elapsed_time(end) / 1e3)
    return benchmark.extra_info["bytes"] / benchmark.stats["min"] / copied

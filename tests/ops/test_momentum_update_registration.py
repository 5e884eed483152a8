# SPDX-License-Identifier: Apache-2.0
"""The ops of a training step as torch sees them: registered, compiled without a break, quiet on the host.

Where there is no GPU, the Triton side of an op runs interpreted on CPU tensors.
"""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops import device_flag
from fastreid_u.ops._cluster_nce import cluster_nce_backward_op, cluster_nce_op
from fastreid_u.ops._cluster_nce import run_triton as nce_triton
from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.ops.momentum_update import RULES, _momentum_update, momentum_update_
from fastreid_u.ops.momentum_update import _triton as update_triton
from fastreid_u.reference.cluster_nce import cluster_nce as reference_nce
from fastreid_u.reference.momentum_update import momentum_update_ as reference_update

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULTS = {
    "temperature": 0.05, "normalize": True, "teacher": None, "teacher_weight": None, "teacher_temperature": None,
    "smoothing": 0.0, "extra_target": None, "extra_weight": None, "focal": 0.0, "epsilon": 0.0, "class_mask": None,
    "weight": None, "ignore_index": -1, "reduction": "mean",
}  # fmt: skip
PLAIN = (None,) * 3 + ([0.0, 0.0, 0.0], 0.1, 0.1, 0.0, 0.0, True, -1)


def batch(b=9, c=13, d=6, dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(b + c)
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    memory = F.normalize(torch.randn(c, d, generator=generator, dtype=torch.float64))
    targets = torch.randint(-1, c, (b,), generator=generator)
    return x.to(device, dtype), targets.to(device), memory.to(device, dtype)


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.setattr(device_flag, "_flags", {})


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lean", [False, True])
def test_opcheck_nce(trained, reduction, lean):
    x, targets, memory = batch()
    x.requires_grad_()
    memory.requires_grad_(trained)
    arguments = (x, targets, memory, None, None, None, torch.rand(9, device=DEVICE), *PLAIN, reduction, lean)
    torch.library.opcheck(cluster_nce_op, arguments)


def test_opcheck_nce_backward():
    x, targets, memory = batch()
    loss, stats, logits = cluster_nce_op(x, targets, memory, None, None, None, None, *PLAIN, "mean", False)
    for needs in ((True, False), (False, True), (True, True)):
        arguments = (
            torch.ones_like(loss),
            x,
            targets,
            memory,
            None,
            None,
            None,
            stats,
            logits,
            0.1,
            0.1,
            False,
            True,
            -1,
        )
        torch.library.opcheck(cluster_nce_backward_op, (*arguments, *needs))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_opcheck_update(rule, skip):
    x, targets, memory = batch()
    found_inf = None if skip is None else torch.tensor([skip], device=DEVICE)
    means = index = labels = sizes = None
    if rule == "row":
        labels, means = torch.arange(13, device=DEVICE) % 4, torch.zeros(4, 6, device=DEVICE)
        sizes = torch.bincount(labels)
    if rule == "index":
        index = torch.full((13,), -1, device=DEVICE)
        index[targets.max()] = targets.argmax()
    arguments = (0.1, rule, True, 0.1 if rule == "weighted" else None, 0.2, index, labels, sizes, found_inf, "auto")
    torch.library.opcheck(_momentum_update, (memory, means, x, targets, *arguments))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_registered_nce_has_the_gradients_of_the_reference(reduction):
    x, targets, memory = batch()
    weight = torch.linspace(0, 2, 9, device=DEVICE)
    both = []
    for run in (nce_triton, reference_nce):
        leaves = x.clone().requires_grad_(), memory.clone().requires_grad_()
        loss = run(leaves[0], targets, leaves[1], **DEFAULTS | {"weight": weight, "reduction": reduction})
        both.append((loss.detach(), *torch.autograd.grad((loss * (loss.detach() + 1)).sum(), leaves)))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_registered_nce_gives_no_gradient_to_a_plain_memory():
    x, targets, memory = batch()
    nce_triton(x.requires_grad_(), targets, memory, **DEFAULTS).backward()
    assert memory.grad is None
    assert x.grad.abs().sum() > 0
    frozen = nce_triton(x.detach(), targets, memory.requires_grad_(), **DEFAULTS)
    frozen.backward()
    assert memory.grad.abs().sum() > 0


def test_the_loss_keeps_the_old_memory_or_says_so():
    """An update between loss and backward would change the gradient: torch refuses it."""
    x, targets, memory = batch()
    loss = nce_triton(x.requires_grad_(), targets, memory, **DEFAULTS)
    momentum_update_(memory, x, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


SHAPES = [(9, 13, 6), (12, 20, 6), (7, 31, 6), (12, 13, 6), (16, 40, 6)]  # of one model: the width stays


@pytest.mark.parametrize("side", ["auto", "triton"])
def test_compiles_whole_with_one_recompilation_for_five_shapes(side):
    from torch._dynamo.testing import CompileCounterWithBackend

    def step(x, targets, memory):
        if side == "auto":
            return cluster_nce(x, targets, memory)
        return nce_triton(x, targets, memory, **DEFAULTS)

    def update(memory, x, targets):
        return momentum_update_(memory, x, targets)

    torch._dynamo.reset()
    counters = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    compiled_step, compiled_update = (
        torch.compile(function, backend=counter, fullgraph=True)
        for function, counter in zip((step, update), counters, strict=True)
    )
    for shape in SHAPES:
        x, targets, memory = batch(*shape)
        leaf, moved = x.clone().requires_grad_(), memory.clone()
        loss = compiled_step(leaf, targets, memory)
        loss.backward()
        found = compiled_update(moved, x, targets)
        expected = x.clone().requires_grad_()
        reference_nce(expected, targets, memory).backward()
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=2e-6)
        assert found is moved
        torch.testing.assert_close(moved, reference_update(memory.clone(), x, targets), rtol=0, atol=1e-6)
    assert max(counter.frame_count for counter in counters) <= 2


@pytest.mark.parametrize("rule", ["weighted", "index", "row", "push"])
def test_every_rule_compiles_whole(rule):
    x, targets, memory = batch()
    settings = {"rule": rule, "found_inf": torch.zeros(1, device=DEVICE)}
    if rule == "weighted":
        settings["weight_temperature"] = 0.1
    if rule == "index":
        settings["index"] = torch.full((13,), -1, device=DEVICE)
        settings["index"][targets.max()] = targets.argmax()
    if rule == "row":
        labels = torch.arange(13, device=DEVICE) % 4
        settings |= {"labels": labels, "cluster_sizes": labels.bincount(), "cluster_means": memory[:4].clone()}
    torch._dynamo.reset()
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    rows = momentum_update_(memory.clone(), x, targets, **expected)
    compiled = torch.compile(lambda *args: momentum_update_(*args, **settings), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(memory, x, targets), rows)
    if rule == "row":
        assert torch.equal(settings["cluster_means"], expected["cluster_means"])


def test_a_compiled_update_still_checks_its_targets():
    x, targets, memory = batch(device="cpu")
    before = memory.clone()
    targets[2] = 13
    update = torch.compile(lambda *args: momentum_update_(*args), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"momentum_update_: targets must lie in \[0, 13\), got 13"):
        update(memory, x, targets)
    assert torch.equal(memory, before)


def test_what_a_kernel_flags_is_raised_when_asked():
    x, targets, memory = batch()
    targets[:] = 1
    device_flag.raise_flagged()
    targets[4] = 13
    assert nce_triton(x, targets, memory, **DEFAULTS).isnan()
    with pytest.raises(ValueError, match=r"cluster_nce: targets must lie in \[0, C\)"):
        device_flag.raise_flagged()
    device_flag.raise_flagged()
    targets[4], x[3] = 1, torch.nan
    update_triton(memory, x, targets, momentum=0.1, rule="sequential", found_inf=None)
    with pytest.raises(ValueError, match="momentum_update_: x must be finite"):
        device_flag.raise_flagged()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("index", "row")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 2), (40, 7, 19), (65, 3, 130)])
def test_numba_update_matches_the_reference(b, c, d, dtype, rule):
    x, targets, memory = batch(b, c, d, dtype, device="cpu")
    settings = {"momentum": 0.3, "rule": rule, "weight_temperature": 0.1 if rule == "weighted" else None}
    truth = reference_update(memory.double(), x.double(), targets, **settings)
    same = reference_update(memory.clone(), x, targets, **settings)
    found = momentum_update_(memory.clone(), x, targets, backend="numba", **settings)
    slack = 4 * torch.finfo(dtype).eps
    assert (found.double() - truth).abs().max() <= 2 * (same.double() - truth).abs().max() + slack


@pytest.mark.filterwarnings("ignore:momentum_update_. numba has no torch.*, running the slow reference:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_that_numba_lacks_run_on_the_reference(dtype):
    x, targets, memory = batch(device="cpu")
    expected = reference_update(memory.to(dtype), x, targets)
    assert torch.equal(momentum_update_(memory.to(dtype), x, targets), expected)
    with pytest.raises(RuntimeError, match="got 'numba': numba has no"):
        momentum_update_(memory.to(dtype), x, targets, backend="numba")


@pytest.mark.parametrize("op", ["cluster_nce", "momentum_update_"])
def test_triton_does_not_take_what_it_cannot(op):
    x, targets, memory = batch(device="cpu")
    run = {
        "cluster_nce": cluster_nce,
        "momentum_update_": lambda x, y, m, backend: momentum_update_(m, x, y, backend=backend),
    }
    with pytest.raises(RuntimeError, match=f"{op}: backend must run on cpu tensors, got 'triton'"):
        run[op](x, targets, memory, backend="triton")
    with pytest.raises(
        RuntimeError, match=f"{op}: backend must be able to run here, got 'triton': the kernel computes"
    ):
        run[op](x.double(), targets, memory.double(), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts synchronisations, and there is no CUDA device")
def test_a_step_on_a_gpu_never_waits():
    x, targets, memory = batch(256, 700, 2048)
    x.requires_grad_()
    for mode in ("default", "error"):  # the first round compiles and makes the flags
        torch.cuda.set_sync_debug_mode(mode)
        try:
            cluster_nce(x, targets, memory).backward()
            momentum_update_(memory, x, targets, found_inf=torch.zeros(1, device=DEVICE))
        finally:
            torch.cuda.set_sync_debug_mode("default")

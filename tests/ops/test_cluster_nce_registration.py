# SPDX-License-Identifier: Apache-2.0
"""``cluster_nce`` as torch sees it, with every option: registered, compiled whole, few launches, quiet on the host.

Where there is no GPU, the Triton side runs interpreted on CPU tensors.
"""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.kernels import cluster_nce as nce
from fastreid_u.ops import device_flag
from fastreid_u.ops._cluster_nce import cluster_nce_backward_op, cluster_nce_op
from fastreid_u.ops._cluster_nce import run_triton as triton
from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.ops.momentum_update import momentum_update_
from fastreid_u.reference.cluster_nce import cluster_nce as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULTS = {
    "temperature": 0.05, "normalize": True, "teacher": None, "teacher_weight": None, "teacher_temperature": None,
    "smoothing": 0.0, "extra_target": None, "extra_weight": None, "focal": 0.0, "epsilon": 0.0, "class_mask": None,
    "weight": None, "ignore_index": -1, "reduction": "mean",
}  # fmt: skip
METHODS = ["DCCC", "SpCL", "CACL", "PPLR body", "PPLR parts", "all"]
PLAIN = (None,) * 3 + ([0.0, 0.0, 0.0], 0.1, 0.1, 0.0, 0.0, True, -1)


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.setattr(device_flag, "_flags", {})


def batch(method, b=9, c=14, d=6, device=DEVICE):
    """x, targets, memory and what a published method sets."""
    generator = torch.Generator().manual_seed(b + c)
    x, teacher = (torch.randn(b, d, generator=generator).to(device) for _ in range(2))
    memory = F.normalize(torch.randn(c, d, generator=generator)).to(device)
    targets = (torch.randint(c, (b,), generator=generator) // 2 * 2).to(device)
    targets[3] = -1
    mask = torch.arange(c, device=device) % 2 == 0
    extra, share = torch.rand(b, c, generator=generator).softmax(1).to(device), torch.linspace(0, 0.5, b, device=device)
    settings = {
        "plain": {},
        "DCCC": {"teacher": teacher, "teacher_weight": 0.1},
        "SpCL": {"class_mask": mask, "epsilon": 1e-6},
        "CACL": {"class_mask": mask, "epsilon": 1e-6, "focal": 4.0},
        "PPLR body": {"extra_target": extra, "extra_weight": 0.5, "temperature": 1.0, "normalize": False},
        "PPLR parts": {"smoothing": share, "temperature": 1.0, "normalize": False},
        "all": {
            "teacher": teacher, "teacher_weight": share, "teacher_temperature": 0.1, "smoothing": 0.1,
            "extra_target": extra, "extra_weight": 0.2, "focal": 2.0, "class_mask": mask, "weight": share,
        },
    }[method]  # fmt: skip
    return x, targets, memory, DEFAULTS | settings


def plain_batch(b=9, c=13, d=6):
    """x, targets, memory of a loss without options; some samples are ignored."""
    generator = torch.Generator().manual_seed(b + c)
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    memory = F.normalize(torch.randn(c, d, generator=generator, dtype=torch.float64))
    targets = torch.randint(-1, c, (b,), generator=generator)
    return x.to(DEVICE, torch.float32), targets.to(DEVICE), memory.to(DEVICE, torch.float32)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lean", [False, True])
def test_opcheck_nce(trained, reduction, lean):
    x, targets, memory = plain_batch()
    x.requires_grad_()
    memory.requires_grad_(trained)
    arguments = (x, targets, memory, None, None, None, torch.rand(9, device=DEVICE), *PLAIN, reduction, lean)
    torch.library.opcheck(cluster_nce_op, arguments)


def test_opcheck_nce_backward():
    x, targets, memory = plain_batch()
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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_registered_nce_has_the_gradients_of_the_reference(reduction):
    x, targets, memory = plain_batch()
    weight = torch.linspace(0, 2, 9, device=DEVICE)
    both = []
    for run in (triton, reference):
        leaves = x.clone().requires_grad_(), memory.clone().requires_grad_()
        loss = run(leaves[0], targets, leaves[1], **DEFAULTS | {"weight": weight, "reduction": reduction})
        both.append((loss.detach(), *torch.autograd.grad((loss * (loss.detach() + 1)).sum(), leaves)))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_registered_nce_gives_no_gradient_to_a_plain_memory():
    x, targets, memory = plain_batch()
    triton(x.requires_grad_(), targets, memory, **DEFAULTS).backward()
    assert memory.grad is None
    assert x.grad.abs().sum() > 0
    frozen = triton(x.detach(), targets, memory.requires_grad_(), **DEFAULTS)
    frozen.backward()
    assert memory.grad.abs().sum() > 0


def test_the_loss_keeps_the_old_memory_or_says_so():
    """An update between loss and backward would change the gradient: torch refuses it."""
    x, targets, memory = plain_batch()
    loss = triton(x.requires_grad_(), targets, memory, **DEFAULTS)
    momentum_update_(memory, x, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_opcheck(method, lean):
    x, targets, memory, given = batch(method)
    shares = [given["teacher_weight"], given["smoothing"], given["extra_weight"]]
    each = [share if torch.is_tensor(share) else None for share in shares]
    one = [share if isinstance(share, float) else 0.0 for share in shares]
    tensors = given["teacher"], given["extra_target"], given["class_mask"]
    temperatures = given["temperature"], given["teacher_temperature"] or given["temperature"]
    rest = given["focal"], given["epsilon"], given["normalize"], -1, "mean", lean
    arguments = (*tensors, given["weight"], *each, one, *temperatures, *rest)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if method == "all":  # the costly one once
        checks.append("test_aot_dispatch_dynamic")
    leaves = x.clone().requires_grad_(), targets, memory.clone().requires_grad_()
    torch.library.opcheck(cluster_nce_op, (*leaves, *arguments), test_utils=checks)
    loss, stats, logits = cluster_nce_op(x, targets, memory, *arguments)
    settings = (*temperatures, given["smoothing"] is not None, given["normalize"], -1, True, True)
    backward = (torch.ones_like(loss), x, targets, memory, *tensors, stats, logits, *settings)
    torch.library.opcheck(cluster_nce_backward_op, backward, test_utils=checks)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registered_op_has_the_gradients_of_the_reference(method, reduction):
    x, targets, memory, settings = batch(method)
    both = []
    for run in (triton, reference):
        leaves = x.clone().requires_grad_(), memory.clone().requires_grad_()
        loss = run(leaves[0], targets, leaves[1], **settings | {"reduction": reduction})
        both.append((loss.detach(), *torch.autograd.grad((loss * (loss.detach() + 1)).sum(), leaves)))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


SHAPES = [(9, 14, 6), (12, 20, 6), (7, 32, 6), (12, 14, 6), (16, 40, 6)]  # of one model: the width stays


@pytest.mark.parametrize("side", ["auto", "triton"])
@pytest.mark.parametrize("method", ["plain", *METHODS])
def test_compiles_whole_with_one_recompilation_for_five_shapes(method, side):
    from torch._dynamo.testing import CompileCounterWithBackend

    def step(x, targets, memory, settings):
        return (cluster_nce if side == "auto" else triton)(x, targets, memory, **settings)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for shape in SHAPES:
        x, targets, memory, settings = batch(method, *shape)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(found, targets, memory, settings).backward()
        reference(expected, targets, memory, **settings).backward()
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=2e-6)
    assert counter.frame_count <= 2


def test_a_share_of_nothing_costs_nothing(monkeypatch):
    x, targets, memory, settings = batch("all")
    settings |= {"teacher_weight": 0.0, "extra_weight": 0.0}
    given, fwd = [], nce.cluster_nce_fwd
    monkeypatch.setattr(nce, "cluster_nce_fwd", lambda *args, **kwargs: given.append(args[3]) or fwd(*args, **kwargs))
    triton(x, targets, memory, **settings)
    assert given[0].teacher is None
    assert given[0].extra_target is None


def test_a_masked_target_is_raised_when_asked():
    x, targets, memory, settings = batch("SpCL")
    triton(x, targets, memory, **settings)
    device_flag.raise_flagged()
    targets[1] = 3
    assert triton(x, targets, memory, **settings).isnan()
    with pytest.raises(ValueError, match="cluster_nce: targets must be True in class_mask, got one that is masked"):
        device_flag.raise_flagged()


@pytest.fixture
def on_meta(launches, torch_calls):
    """``run(method, b, c, d)``: launches and bytes of scratch of loss and gradient. Meta tensors refuse every read."""

    def run(method, b, c, d):
        made = launches(nce.logits, nce.loss, nce.backward)

        def meta(*shape, dtype=torch.float32):
            return torch.empty(*shape, dtype=dtype, device="meta")

        x = meta(b, d).requires_grad_()
        targets, memory = meta(b, dtype=torch.int64), meta(c, d)
        _, _, _, settings = batch(method, device="cpu")
        shapes = {"teacher": (b, d), "extra_target": (b, c), "class_mask": (c,)}
        for name, value in settings.items():
            if torch.is_tensor(value):
                settings[name] = meta(*shapes.get(name, (b,)), dtype=value.dtype)
        settings = {name: value for name, value in settings.items() if value is not None}
        upstream = meta(())
        with torch_calls() as calls:
            nce.cluster_nce(x, targets, memory, **settings).backward(upstream)
        assert calls.computed == []  # each would be one more launch
        return len(made), calls.bytes - x.nbytes  # less the gradient

    return run


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_three_launches_and_read_nothing_back(on_meta, method):
    launched, _ = on_meta(method, 256, 700, 2048)
    assert launched == 3


@pytest.mark.parametrize("method", ["DCCC", "CACL", "PPLR parts"])
def test_lean_memory_is_bounded(on_meta, method):
    _, scratch = on_meta(method, 256, 1_000_000, 384)
    assert 2**20 < scratch <= 64 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["plain", *METHODS])
def test_a_step_on_a_gpu_never_waits(method):
    x, targets, memory, settings = batch(method, 256, 700, 2048)
    x.requires_grad_()
    for mode in ("default", "error"):  # the first round compiles and makes the flags
        torch.cuda.set_sync_debug_mode(mode)
        try:
            cluster_nce(x, targets, memory, **settings).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_target_out_of_range_is_raised_when_asked():
    x, targets, memory = plain_batch()
    targets[:] = 1
    device_flag.raise_flagged()
    targets[4] = 13
    assert triton(x, targets, memory, **DEFAULTS).isnan()
    with pytest.raises(ValueError, match=r"cluster_nce: targets must lie in \[0, C\)"):
        device_flag.raise_flagged()
    device_flag.raise_flagged()


def test_triton_does_not_take_what_it_cannot():
    x, targets, memory = (each.cpu() for each in plain_batch())
    with pytest.raises(RuntimeError, match="cluster_nce: backend must run on cpu tensors, got 'triton'"):
        cluster_nce(x, targets, memory, backend="triton")
    with pytest.raises(
        RuntimeError, match="cluster_nce: backend must be able to run here, got 'triton': the kernel computes"
    ):
        cluster_nce(x.double(), targets, memory.double(), backend="triton")

# SPDX-License-Identifier: Apache-2.0
"""``momentum_update_`` as torch sees it: registered, compiled without a break, quiet on the host; and on numba.

Where there is no GPU, the Triton side runs interpreted on CPU tensors.
"""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops import device_flag
from fastreid_u.ops.momentum_update import RULES, _momentum_update, momentum_update_
from fastreid_u.ops.momentum_update import _triton as update_triton
from fastreid_u.reference.momentum_update import momentum_update_ as reference_update

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch(b=9, c=13, d=6, dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(b + c)
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    memory = F.normalize(torch.randn(c, d, generator=generator, dtype=torch.float64))
    targets = torch.randint(-1, c, (b,), generator=generator)
    return x.to(device, dtype), targets.to(device), memory.to(device, dtype)


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.setattr(device_flag, "_flags", {})


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


SHAPES = [(9, 13, 6), (12, 20, 6), (7, 31, 6), (12, 13, 6), (16, 40, 6)]  # of one model: the width stays


def test_compiles_whole_with_one_recompilation_for_five_shapes():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: momentum_update_(*args), backend=counter, fullgraph=True)
    for shape in SHAPES:
        x, targets, memory = batch(*shape)
        moved = memory.clone()
        assert compiled(moved, x, targets) is moved
        torch.testing.assert_close(moved, reference_update(memory.clone(), x, targets), rtol=0, atol=1e-6)
    assert counter.frame_count <= 2


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
    x[3] = torch.nan
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


def test_triton_does_not_take_what_it_cannot():
    x, targets, memory = batch(device="cpu")
    with pytest.raises(RuntimeError, match="momentum_update_: backend must run on cpu tensors, got 'triton'"):
        momentum_update_(memory, x, targets, backend="triton")
    with pytest.raises(
        RuntimeError, match="momentum_update_: backend must be able to run here, got 'triton': the kernel computes"
    ):
        momentum_update_(memory.double(), x.double(), targets, backend="triton")


@pytest.mark.gpu
def test_an_update_on_a_gpu_never_waits():
    x, targets, memory = batch(256, 700, 2048)
    for mode in ("default", "error"):  # the first round compiles and makes the flags
        torch.cuda.set_sync_debug_mode(mode)
        try:
            momentum_update_(memory, x, targets, found_inf=torch.zeros(1, device=DEVICE))
        finally:
            torch.cuda.set_sync_debug_mode("default")

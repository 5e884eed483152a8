# SPDX-License-Identifier: Apache-2.0
"""The Triton ``cluster_nce`` without options: on a GPU if there is one, else interpreted.

Truth is the reference in float64; a kernel may be off by twice what the reference in the same dtype is off by.
"""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.kernels import cluster_nce as nce
from fastreid_u.reference.cluster_nce import cluster_nce as reference_nce

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GOLDEN = ["cm_all_b50_d48_k23", "cm_random_b50_d48_k23", "cm_one_b64_d96_k40"]


def batch(b, c, d, dtype=torch.float32, number=0):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(b, d, generator=generator).to(dtype)
    memory = F.normalize(torch.randn(c, d, generator=generator)).to(dtype)
    return x.to(DEVICE), torch.randint(-1, c, (b,), generator=generator).to(DEVICE), memory.to(DEVICE)


def assert_as_good(found, same_dtype, truth, name):
    """``found`` may err twice as much as ``same_dtype``, and by a few roundings of the largest entry."""
    truth = truth.double()
    roundings = 1 if found.dtype == torch.bfloat16 else 4  # Triton's interpreter cuts bfloat16 off instead of rounding
    slack = roundings * torch.finfo(found.dtype).eps * (truth.abs().max().item() if truth.numel() else 0)
    error, allowed = (found.double() - truth).abs(), 2 * (same_dtype.double() - truth).abs().max() + slack
    worst = error.argmax()
    assert error.max() <= allowed, f"{name}: error {error.max():.3g} > {allowed:.3g} at {worst} of {tuple(truth.shape)}"


def loss_and_gradients(op, x, targets, memory, **settings):
    x, memory = x.detach().clone().requires_grad_(), memory.detach().clone().requires_grad_()
    loss = op(x, targets, memory, **settings)
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device)
    (loss * upstream.reshape(loss.shape)).sum().backward()
    return loss.detach(), x.grad, memory.grad


def check_nce(x, targets, memory, *, lean=None, **settings):
    found = loss_and_gradients(nce.cluster_nce, x, targets, memory, lean=lean, **settings)
    same = loss_and_gradients(reference_nce, x, targets, memory, **settings)
    truth = loss_and_gradients(reference_nce, x.double(), targets, memory.double(), **settings)
    for name, *numbers in zip(("loss", "gradient to x", "gradient to memory"), found, same, truth, strict=True):
        assert numbers[0].dtype == numbers[1].dtype
        assert_as_good(*numbers, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 1), (3, 65, 5), (65, 7, 33), (70, 129, 70)])
def test_nce_matches_the_reference(b, c, d, dtype):
    check_nce(*batch(b, c, d, dtype))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lean", [False, True])
def test_nce_settings(normalize, reduction, lean):
    x, targets, memory = batch(20, 70, 37)
    x = x if normalize else F.normalize(x)
    settings = {"weight": torch.linspace(0, 2, 20, device=DEVICE), "temperature": 0.1}
    check_nce(x, targets, memory, normalize=normalize, reduction=reduction, lean=lean, **settings)


def test_nce_mixed_dtypes_and_tf32():
    x, targets, memory = batch(9, 13, 20)
    check_nce(x.half(), targets, memory)
    check_nce(x, targets, memory.bfloat16())
    coarse = nce.cluster_nce(x, targets, memory, precision="tf32")
    torch.testing.assert_close(coarse, nce.cluster_nce(x, targets, memory), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", GOLDEN)
def test_nce_golden(golden, name):
    file = golden(name)
    x = file.tensor("inputs").to(DEVICE).requires_grad_()
    targets, memory = file.tensor("targets").to(DEVICE), file.tensor("features_before").to(DEVICE)
    for temperature in (0.05, 0.1):
        loss = nce.cluster_nce(x, targets, memory, temperature=temperature)
        (gradient,) = torch.autograd.grad(loss, x)
        tag = f"cm_t{temperature}_m0.2"
        torch.testing.assert_close(loss.detach().cpu(), file.tensor(f"loss_{tag}"), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.cpu(), file.tensor(f"grad_{tag}"), rtol=1e-4, atol=2e-6)


def test_nce_classes_split_over_programs(monkeypatch):
    """Few samples and columns, many classes: the backward splits them, and so does the forward once made to."""
    x, targets, memory = batch(6, 700, 9)
    check_nce(x, targets, memory)
    monkeypatch.setattr(nce.loss, "MAX_SPLITS", 4)
    check_nce(x, targets, memory)


def test_nce_lean_in_blocks(monkeypatch, exact_sums):
    x, targets, memory = batch(6, 300, 9)
    x, memory = exact_sums(x, memory)
    stored = loss_and_gradients(nce.cluster_nce, x, targets, memory, lean=False)
    monkeypatch.setattr(nce.backward, "LEAN_BYTES", 4 * 6 * 128)
    lean = loss_and_gradients(nce.cluster_nce, x, targets, memory, lean=True)
    assert torch.equal(lean[0], stored[0])
    torch.testing.assert_close(lean[1:], stored[1:], rtol=1e-5, atol=1e-6)


def test_nce_bits_of_a_sample_do_not_depend_on_its_company(exact_sums):
    x, targets, memory = batch(70, 40, 33)
    x, memory = exact_sums(x, memory)
    each = nce.cluster_nce(x, targets, memory, reduction="none")
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(nce.cluster_nce(x[order], targets[order], memory, reduction="none"), each[order])
    assert torch.equal(nce.cluster_nce(x[5:9], targets[5:9], memory, reduction="none"), each[5:9])


def test_nce_ignored_samples_may_hold_anything():
    x, targets, memory = batch(9, 13, 6)
    targets[:] = torch.tensor([-1, 2, -1, 4, 5, 6, 7, 8, 12])
    x[0], x[2] = torch.nan, torch.inf
    loss, grad_x, grad_memory = loss_and_gradients(nce.cluster_nce, x, targets, memory)
    kept = targets != -1
    expected = loss_and_gradients(nce.cluster_nce, x[kept], targets[kept], memory)
    torch.testing.assert_close((loss, grad_x[kept], grad_memory), expected)
    assert (grad_x[~kept] == 0).all()


def test_nce_nan_shows():
    x, targets, memory = batch(9, 13, 6)
    targets[3] = 1
    x[3, 2] = torch.nan
    assert nce.cluster_nce(x, targets, memory).isnan()
    each = nce.cluster_nce(x, targets, memory, reduction="none")
    assert each.isnan().tolist() == [b == 3 for b in range(9)]


def test_nce_nobody_left_and_nobody_there():
    x, targets, memory = batch(4, 3, 5)
    loss, grad_x, _ = loss_and_gradients(nce.cluster_nce, x, torch.full_like(targets, -1), memory)
    assert loss == 0
    assert (grad_x == 0).all()
    loss, grad_x, grad_memory = loss_and_gradients(nce.cluster_nce, x[:0], targets[:0], memory)
    assert loss == 0
    assert grad_x.shape == (0, 5)
    assert (grad_memory == 0).all()


def test_nce_zero_row_and_low_temperature():
    x, targets, memory = batch(5, 4, 6)
    targets = targets.clamp(min=0)
    loss, grad_x, _ = loss_and_gradients(nce.cluster_nce, x, targets, memory, temperature=1e-4)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad_x).all()
    x[2] = 0
    check_nce(x, targets, memory)


def test_nce_strides():
    x, targets, memory = batch(7, 11, 10)
    wide_x, wide_memory = torch.zeros(7, 30, device=DEVICE), torch.zeros(11, 20, device=DEVICE)
    wide_x[:, 10:20], wide_memory[:, ::2] = x, memory
    column = torch.stack([targets, targets], 1)[:, 0]
    expected = nce.cluster_nce(x, targets, memory)
    assert torch.equal(nce.cluster_nce(wide_x[:, 10:20], column, wide_memory[:, ::2]), expected)
    assert torch.equal(nce.cluster_nce(x.T.contiguous().T, targets.int(), memory), expected)


@pytest.mark.parametrize("bad", [-2, 13, 2**40])
def test_nce_target_out_of_range_is_nan_and_flagged(bad):
    x, targets, memory = batch(9, 13, 6)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    fine = nce.cluster_nce(x, targets, memory, reduction="none", status=status)
    assert status.item() == 0
    targets[4] = bad
    each = nce.cluster_nce(x, targets, memory, reduction="none", status=status)
    assert status.item() == nce.BAD_TARGET
    assert each.isnan().tolist() == [b == 4 for b in range(9)]
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(each[others], fine[others])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": torch.ones(0, 4)}, ValueError, "memory must have at least one row"),
        ({"memory": torch.ones(3, 5)}, ValueError, "x, targets, memory must be"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "x, targets, memory must be"),
        ({"x": torch.ones(2, 4, dtype=torch.float64)}, TypeError, "x must be float32, float16 or bfloat16"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"precision": "fp8"}, ValueError, "precision must be one of"),
    ],
)
def test_nce_rejects(change, error, message):
    arguments = {"x": torch.ones(2, 4), "targets": torch.tensor([0, 1]), "memory": torch.ones(3, 4), **change}
    with pytest.raises(error, match=f"cluster_nce: {message}"):
        nce.cluster_nce(**arguments)

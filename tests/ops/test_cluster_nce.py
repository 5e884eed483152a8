# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss: value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.cluster_nce import cluster_nce


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)

    def make(b=9, c=13, d=6, dtype=torch.float64):
        x = torch.randn(b, d, generator=generator, dtype=torch.float64).to(dtype)
        memory = F.normalize(torch.randn(c, d, generator=generator, dtype=torch.float64)).to(dtype)
        return x, torch.randint(c, (b,), generator=generator), memory

    return make


@pytest.mark.parametrize("name", ["cm_all_b50_d48_k23", "cm_random_b50_d48_k23", "cm_one_b64_d96_k40"])
@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_golden(golden, name, temperature):
    file = golden(name)
    x = file.tensor("inputs").requires_grad_()
    loss = cluster_nce(x, file.tensor("targets"), file.tensor("features_before"), temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, x)
    tag = f"cm_t{temperature}_m0.2"
    torch.testing.assert_close(loss.detach(), file.tensor(f"loss_{tag}"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, file.tensor(f"grad_{tag}"), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 1), (3, 2, 5), (9, 13, 6), (65, 33, 7)])
def test_is_cross_entropy(batch, b, c, d):
    x, targets, memory = batch(b, c, d)
    logits = F.normalize(x) @ memory.T / 0.07
    for reduction in ("mean", "sum", "none"):
        found = cluster_nce(x, targets, memory, temperature=0.07, reduction=reduction)
        torch.testing.assert_close(found, F.cross_entropy(logits, targets, reduction=reduction), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(batch, normalize, weighted):
    x, targets, memory = batch(5, 4, 3)
    targets[2] = -1
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64) if weighted else None

    def loss(x, memory):
        return cluster_nce(x, targets, memory, temperature=0.3, normalize=normalize, weight=weight)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), memory.requires_grad_()))


def test_no_gradient_to_a_plain_memory(batch):
    x, targets, memory = batch()
    cluster_nce(x.requires_grad_(), targets, memory).backward()
    assert memory.grad is None
    assert x.grad.abs().sum() > 0


def test_normalises_here_or_not(batch):
    x, targets, memory = batch()
    inside = cluster_nce(3 * x, targets, memory)
    torch.testing.assert_close(cluster_nce(F.normalize(x), targets, memory, normalize=False), inside)


def test_ignored_samples_take_no_part(batch):
    x, targets, memory = batch()
    kept = torch.tensor([0, 3, 4, 8])
    some = torch.full_like(targets, -1)
    some[kept] = targets[kept]
    torch.testing.assert_close(cluster_nce(x, some, memory), cluster_nce(x[kept], targets[kept], memory))
    each = cluster_nce(x, some, memory, reduction="none")
    assert (each[some == -1] == 0).all()
    renamed = torch.where(some == -1, 255, some)
    torch.testing.assert_close(cluster_nce(x, renamed, memory, ignore_index=255), cluster_nce(x, some, memory))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nobody_left_is_zero_with_zero_gradient(batch, reduction):
    x, targets, memory = batch()
    loss = cluster_nce(x.requires_grad_(), torch.full_like(targets, -1), memory, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()


def test_empty_batch(batch):
    x, targets, memory = batch(b=0)
    assert cluster_nce(x, targets, memory).item() == 0


def test_weights_scale_and_do_not_enter_the_divisor(batch):
    x, targets, memory = batch()
    targets[0] = -1
    weight = torch.linspace(0, 2, 9, dtype=torch.float64)
    each = cluster_nce(x, targets, memory, reduction="none")
    torch.testing.assert_close(cluster_nce(x, targets, memory, weight=weight), (weight * each).sum() / 8)


def test_low_temperature_does_not_overflow(batch):
    x, targets, memory = batch(dtype=torch.float32)
    x.requires_grad_()
    loss = cluster_nce(x, targets, memory, temperature=1e-4)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_zero_row_gives_a_finite_gradient(batch):
    x, targets, memory = batch(dtype=torch.float32)
    x[2] = 0
    cluster_nce(x.requires_grad_(), targets, memory).backward()
    assert torch.isfinite(x.grad).all()


def test_half_precision_is_computed_in_float32(batch):
    x, targets, memory = batch(64, 40, 128, dtype=torch.float32)
    truth = cluster_nce(x.half().double(), targets, memory.double())
    found = cluster_nce(x.half(), targets, memory)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cluster_nce(x.half(), targets, memory), found)


def test_float32_error_is_rounding(batch):
    x, targets, memory = batch(64, 40, 128, dtype=torch.float32)
    truth = cluster_nce(x.double(), targets, memory.double())
    assert abs(cluster_nce(x, targets, memory).double() - truth) < 5e-6


def test_compiles_without_a_graph_break(batch):
    x, targets, memory = batch(dtype=torch.float32)
    compiled = torch.compile(cluster_nce, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, targets, memory), cluster_nce(x, targets, memory))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"temperature": -0.05}, ValueError, "temperature must be positive and finite, got -0.05"),
        ({"temperature": "0.05"}, TypeError, "temperature must be a real number, got '0.05'"),
        ({"targets": torch.tensor([0, 1, 5])}, ValueError, r"targets must lie in \[0, 5\), got 5"),
        ({"targets": torch.tensor([0, -2, 1])}, ValueError, r"targets must lie in \[0, 5\), got -2"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"targets must have one entry for each row of x \(3\), got 2"),
        ({"targets": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "targets must hold integers, got torch.float32"),
        ({"memory": torch.zeros(5, 3)}, ValueError, "memory must have 4 columns like x, got 3"),
        ({"memory": torch.zeros(0, 4)}, ValueError, r"memory must have at least one row, got shape \(0, 4\)"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have one entry for each row of x \(3\), got 2"),
    ],
)
def test_rejects(change, error, message):
    arguments = {"x": torch.ones(3, 4), "targets": torch.tensor([0, 1, 2]), "memory": torch.ones(5, 4), **change}
    with pytest.raises(error, match=f"cluster_nce: {message}"):
        cluster_nce(**arguments)

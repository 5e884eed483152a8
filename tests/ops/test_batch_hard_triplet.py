# SPDX-License-Identifier: Apache-2.0
"""The batch-hard soft triplet loss."""

import pytest
import torch

from fastreid_u.ops.batch_hard_triplet import batch_hard_triplet
from fastreid_u.reference.batch_hard_triplet import batch_hard_triplet as reference


def batch(b, d, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(b)
    x = 10 + 3 * torch.randn(b, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(-1, classes, (b,), generator=generator)


def test_by_hand():
    """An anchor 1.2 from its mate and 1.5 from a stranger."""
    x = torch.tensor([[0.0, 0.0], [1.2, 0.0], [0.0, 1.5], [9.0, 9.0]])
    each = batch_hard_triplet(x, torch.tensor([0, 0, 1, 2]), reduction="none")
    assert each[0].item() == pytest.approx(0.554355, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("b", "d"), [(0, 3), (1, 2), (2, 1), (40, 7)])
def test_matches_the_reference(b, d, reduction):
    x, targets = batch(b, d)
    both = []
    for run in (batch_hard_triplet, reference):
        leaf = x.clone().requires_grad_()
        loss = run(leaf, targets, reduction=reduction)
        both.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_as_exact_as_the_dtype(dtype):
    x, targets = batch(40, 7, dtype=dtype)
    found, truth = batch_hard_triplet(x, targets), reference(x.double(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_near_copies_far_from_the_origin():
    x = 1000 + torch.tensor([[0.0], [0.01], [0.03], [5.0]])
    each = batch_hard_triplet(x, torch.tensor([0, 0, 1, 1]), reduction="none")
    torch.testing.assert_close(each, reference(x, torch.tensor([0, 0, 1, 1]), reduction="none"), rtol=1e-6, atol=0)


def test_gradcheck():
    x, targets = batch(7, 3)
    assert torch.autograd.gradcheck(lambda x: batch_hard_triplet(x, targets), (x.requires_grad_(),))


def test_alone_and_among_its_own():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    alone = batch_hard_triplet(x, torch.tensor([0, 1]))
    expected = torch.nn.functional.softplus(torch.tensor(1e-6 - 2**0.5))
    torch.testing.assert_close(alone.detach(), expected)
    among_its_own = batch_hard_triplet(x, torch.tensor([3, 3]))
    (gradient,) = torch.autograd.grad(among_its_own, x)
    assert among_its_own == 0
    assert (gradient == 0).all()


def test_copies_have_a_finite_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(x, torch.tensor([0, 0, 1, 1])).backward()
    assert (x.grad == 0).all()


def test_ignored_samples_take_no_part():
    x, targets = batch(12, 3)
    kept = targets != -1
    assert 0 < kept.sum() < 12
    torch.testing.assert_close(batch_hard_triplet(x, targets), batch_hard_triplet(x[kept], targets[kept]))
    spoilt = x.masked_fill(~kept[:, None], torch.nan).requires_grad_()
    batch_hard_triplet(spoilt, targets).backward()
    assert torch.isfinite(spoilt.grad).all()
    renamed = torch.where(kept, targets, 255)
    torch.testing.assert_close(batch_hard_triplet(x, renamed, ignore_index=255), batch_hard_triplet(x, targets))


def test_a_byte_of_255_is_a_target():
    x, targets = batch(12, 3)
    expected = batch_hard_triplet(x, targets.where(targets >= 0, 255))
    torch.testing.assert_close(batch_hard_triplet(x, targets.to(torch.uint8)), expected)


def test_compiles_whole():
    x, targets = batch(9, 3, dtype=torch.float32)
    run = torch.compile(batch_hard_triplet, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x, targets), batch_hard_triplet(x, targets))


@pytest.mark.parametrize(
    ("x", "targets", "reduction", "error", "message"),
    [
        (torch.ones(2), torch.tensor([0, 1]), "mean", ValueError, "x must be 2-D"),
        (torch.ones(2, 2), torch.tensor([0]), "mean", ValueError, "targets must have one entry for each row of x"),
        (torch.ones(2, 2), torch.tensor([0.0, 1.0]), "mean", TypeError, "targets must hold integers"),
        (torch.ones(2, 2), torch.tensor([0, 1]), "max", ValueError, "reduction must be one of"),
    ],
)
def test_rejects(x, targets, reduction, error, message):
    with pytest.raises(error, match=f"batch_hard_triplet: {message}"):
        batch_hard_triplet(x, targets, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [None, 0.5])
def test_ignore_index_is_an_integer(ignore_index):
    with pytest.raises(TypeError, match="batch_hard_triplet: ignore_index must be an integer, got"):
        batch_hard_triplet(torch.ones(2, 2), torch.tensor([0, 1]), ignore_index=ignore_index)

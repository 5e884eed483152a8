# SPDX-License-Identifier: Apache-2.0
"""The cosine alignment loss."""

import pytest
import torch

from fastreid_u.ops.cosine_align import cosine_align
from fastreid_u.reference.cosine_align import cosine_align as reference


def rows(n, d=5, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_matches_the_reference(indexed, dtype):
    x, goals = rows(6, dtype=dtype), rows(6 if not indexed else 4, dtype=dtype)
    index = torch.tensor([0, 3, 1, 1, 2, 0]) if indexed else None
    both = []
    for run in (cosine_align, reference):
        leaf = x.clone().requires_grad_()
        loss = run(leaf, goals, index)
        loss.backward()
        both.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*both)


def test_ends_of_the_scale_and_zero_rows():
    x = rows(3)
    assert cosine_align(x, 2 * x).item() == pytest.approx(-1)
    assert cosine_align(x, -x).item() == pytest.approx(1)
    assert cosine_align(torch.zeros_like(x), x) == 0


def test_no_gradient_to_the_goals():
    x, goals = rows(4).requires_grad_(), rows(5)[:4].requires_grad_()
    cosine_align(x, goals).backward()
    assert goals.grad is None
    assert torch.autograd.gradcheck(lambda x: cosine_align(x, goals), (x,))


def test_samples_that_take_no_part_may_hold_anything():
    index, goals = torch.tensor([2, -1, 1, -1]), rows(3)
    spoilt, goals[0] = rows(4).requires_grad_(), torch.nan
    spoilt.data[[1, 3]] = torch.tensor([[torch.nan], [torch.inf]], dtype=torch.float64)
    loss = cosine_align(spoilt, goals, index)
    loss.backward()
    torch.testing.assert_close(loss, cosine_align(rows(4)[[0, 2]], goals[[2, 1]]))
    assert (spoilt.grad[[1, 3]] == 0).all()
    assert torch.isfinite(spoilt.grad).all()


def test_some_take_no_part_or_nobody():
    x, goals = rows(4), rows(7)
    some = cosine_align(x, goals, torch.tensor([2, -1, 6, -1]))
    torch.testing.assert_close(some, cosine_align(x[[0, 2]], goals[[2, 6]]))
    for nobody in (goals, goals[:0]):
        leaf = x.clone().requires_grad_()
        loss = cosine_align(leaf, nobody, torch.full((4,), -1))
        loss.backward()
        assert loss == 0
        assert (leaf.grad == 0).all()
    assert cosine_align(x[:0], goals[:0]) == 0


@pytest.mark.parametrize(
    ("goals", "index", "error", "message"),
    [
        (torch.ones(2, 5), None, ValueError, "goals must have one entry for each row of x"),
        (torch.ones(3, 4), None, ValueError, "goals must have 5 columns like x"),
        (torch.ones(2, 5), torch.tensor([0, 1, 2]), ValueError, r"index must lie in \[0, 2\), got 2"),
        (torch.ones(2, 5), torch.tensor([0, 1]), ValueError, "index must have one entry for each row of x"),
        (torch.ones(3, 5).long(), None, TypeError, "goals must be floating point"),
    ],
)
def test_rejects(goals, index, error, message):
    with pytest.raises(error, match=f"cosine_align: {message}"):
        cosine_align(rows(3), goals, index)

# SPDX-License-Identifier: Apache-2.0
"""The teacher that follows its student."""

import copy

import pytest
import torch
from torch import nn

from fastreid_u.ops.ema_update import ema_update_
from fastreid_u.reference.ema_update import ema_update_ as reference


def network(number):
    torch.manual_seed(number)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2 / 3, 0.999, 1.0])
def test_matches_the_reference(alpha):
    student, teacher = network(0), network(1)
    expected = reference(copy.deepcopy(teacher), student, alpha)
    assert ema_update_(teacher, student, alpha) is teacher
    for found, wanted in zip(teacher.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_ends_are_exact():
    student, teacher = network(0), network(1)
    before = copy.deepcopy(teacher)
    ema_update_(teacher, student, 1)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))
    ema_update_(teacher, student, 0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("alpha", [0, 1])
def test_what_has_no_weight_leaves_no_trace(alpha, bad):
    student, teacher = network(0), network(1)
    spoilt, expected = (teacher, student) if alpha == 0 else (student, copy.deepcopy(teacher))
    spoilt[0].weight.data[1] = bad
    ema_update_(teacher, student, alpha)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), expected.parameters(), strict=True))


def test_buffers_and_the_student_stay():
    student, teacher = network(0), network(1)
    teacher[1].running_mean.fill_(7)
    student[1].running_mean.fill_(3)
    before = copy.deepcopy(student)
    ema_update_(teacher, student, 0.5)
    assert (teacher[1].running_mean == 7).all()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters(), strict=True))


def test_dtypes_and_graph():
    teacher, student = network(1).double(), network(0).double()
    student.half()
    ema_update_(teacher, student, 0.9)
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float64}
    assert all(weight.requires_grad and weight.grad_fn is None for weight in teacher.parameters())
    assert isinstance(ema_update_(nn.ReLU(), nn.ReLU(), 0.9), nn.ReLU)


def counting(dtype):
    """A network whose last parameter counts steps."""
    made = network(0)
    made.steps = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    return made


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("owner", ["teacher", "student"])
def test_rejects_what_cannot_be_averaged(owner, dtype):
    teacher, student = (counting(dtype if owner == who else torch.float32) for who in ("teacher", "student"))
    before = teacher[0].weight.clone()
    student[0].weight.data += 1
    with pytest.raises(TypeError, match=f"ema_update_: {owner}'s steps must be floating point"):
        ema_update_(teacher, student, 0.5)
    assert torch.equal(teacher[0].weight, before)


def test_rejects_a_parameter_of_both_under_two_names():
    teacher, student = (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    student[1].weight = teacher[0].weight
    with pytest.raises(ValueError, match=r"student must be another network than teacher, got 0.weight in both"):
        ema_update_(teacher, student, 0.5)


@pytest.mark.parametrize(
    ("student", "alpha", "message"),
    [
        (network(0), 1.5, r"alpha must lie in \[0, 1\], got 1.5"),
        (network(0)[:2], 0.9, r"student must have the parameters of teacher, got '2.bias' in only one"),
        (nn.Sequential(nn.Linear(5, 4), *network(0)[1:]), 0.9, r"student must have 0.weight of shape \(4, 3\) on cpu"),
    ],
)
def test_rejects(student, alpha, message):
    teacher = network(1)
    before = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match=f"ema_update_: {message}"):
        ema_update_(teacher, student, alpha)
    with pytest.raises(ValueError, match=r"student must be another network than teacher, got 0.weight in both"):
        ema_update_(teacher, teacher, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))

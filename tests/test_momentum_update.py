# SPDX-License-Identifier: Apache-2.0
"""Memory updates: published numbers, order, ties, and what must stay untouched."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.momentum_update import momentum_update_

RULES = {"cm": "sequential", "hard": "hard"}


@pytest.mark.parametrize("name", ["cm_all_b50_d48_k23", "cm_random_b50_d48_k23", "cm_one_b64_d96_k40"])
@pytest.mark.parametrize("published", ["cm", "hard"])
@pytest.mark.parametrize("momentum", [0.1, 0.2, 0.9])
def test_golden(golden, name, published, momentum):
    file = golden(name)
    memory = file.tensor("features_before")
    momentum_update_(memory, file.tensor("inputs"), file.tensor("targets"), momentum=momentum, rule=RULES[published])
    expected = file.tensor(f"features_after_{published}_t0.05_m{momentum}")
    torch.testing.assert_close(memory, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("published", ["cm", "hard"])
@pytest.mark.parametrize("momentum", [0.1, 0.2, 0.9])
def test_golden_ten_steps(golden, published, momentum):
    file = golden("cm_trajectory_b32_d64_k24")
    memory = file.tensor("features_before")
    after = dict(zip((1, 2, 3, 5, 10), file.tensor(f"features_each_step_{published}_m{momentum}"), strict=True))
    for step, (x, targets) in enumerate(zip(file.tensor("inputs"), file.tensor("targets"), strict=True), 1):
        momentum_update_(memory, x, targets, momentum=momentum, rule=RULES[published])
        if step in after:
            torch.testing.assert_close(memory, after[step], atol=5e-6 if step == 10 else 1e-6, rtol=0)


def by_definition(memory, x, targets, momentum, rule):
    memory, x = memory.astype(np.float64), x.astype(np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    before = memory.copy()
    for row in range(len(memory)):
        samples = [b for b, target in enumerate(targets) if target == row]
        if rule == "hard" and samples:
            samples = [samples[int(np.argmin([x[b] @ before[row] for b in samples]))]]
        for b in samples:
            memory[row] = momentum * memory[row] + (1 - momentum) * x[b]
            memory[row] /= max(np.linalg.norm(memory[row]), 1e-12)
    return memory


@pytest.mark.parametrize("rule", ["sequential", "hard"])
@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 3), (17, 5, 1), (40, 7, 19)])
def test_matches_definition(b, c, d, rule):
    generator = torch.Generator().manual_seed(b)
    memory = F.normalize(torch.randn(c, d, generator=generator, dtype=torch.float64))
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, c, (b,), generator=generator)
    expected = by_definition(memory.numpy(), x.numpy(), targets.tolist(), 0.3, rule)
    found = momentum_update_(memory.float(), x.float(), targets, momentum=0.3, rule=rule)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    momentum_update_(memory, x, targets, momentum=0.3, rule=rule)
    np.testing.assert_allclose(memory.numpy(), expected, atol=1e-14)


@pytest.fixture
def unit_memory():
    return F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))


def test_in_place_and_returned(unit_memory):
    found = momentum_update_(unit_memory, torch.ones(2, 5), torch.tensor([1, 4]))
    assert found is unit_memory
    torch.testing.assert_close(unit_memory.norm(dim=1), torch.ones(6))


def test_rows_that_nobody_names_keep_their_bits(unit_memory):
    before = unit_memory.clone()
    momentum_update_(unit_memory, torch.eye(5)[:4], torch.tensor([2, -1, 2, -1]))
    assert torch.equal(unit_memory[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    assert not torch.equal(unit_memory[2], before[2])


def test_order_in_the_batch_matters(unit_memory):
    x, targets = torch.eye(5)[:2], torch.tensor([3, 3])
    forward = momentum_update_(unit_memory.clone(), x, targets)
    backward = momentum_update_(unit_memory.clone(), x.flip(0), targets)
    assert forward[3] @ x[1] > 0.9
    assert backward[3] @ x[0] > 0.9


def test_a_column_of_a_wider_buffer(unit_memory):
    wide = torch.zeros(6, 10)
    wide[:, ::2] = unit_memory
    x, targets = torch.eye(5)[:3] + 0.3, torch.tensor([0, 0, 5])
    momentum_update_(wide[:, ::2], x, targets)
    # strided rows may be summed in another order for their length
    torch.testing.assert_close(wide[:, ::2], momentum_update_(unit_memory, x, targets), atol=1e-6, rtol=0)
    assert (wide[:, 1::2] == 0).all()


def test_hard_takes_the_first_of_equally_dissimilar_samples():
    memory = torch.tensor([[1.0, 0.0, 0.0]])
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    momentum_update_(memory, x, torch.tensor([0, 0, 0]), momentum=0.0, rule="hard")
    assert memory.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ends_of_the_momentum_range(unit_memory, momentum):
    before = unit_memory.clone()
    x = torch.tensor([[3.0, -1.0, 0.5, 2.0, 0.0]])
    momentum_update_(unit_memory, x, torch.tensor([2]), momentum=momentum)
    torch.testing.assert_close(unit_memory[2], before[2] if momentum else F.normalize(x)[0])


def test_no_division_by_zero():
    memory = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    momentum_update_(memory, torch.tensor([[-1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]), momentum=0.5)
    assert memory.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.tensor([1])])
def test_found_inf_skips_the_update(unit_memory, bad):
    before = unit_memory.clone()
    momentum_update_(unit_memory, torch.full((1, 5), torch.inf), torch.tensor([0]), found_inf=bad)
    assert torch.equal(unit_memory, before)
    momentum_update_(unit_memory, torch.ones(1, 5), torch.tensor([0]), found_inf=torch.zeros_like(bad))
    assert not torch.equal(unit_memory, before)


def test_takes_features_that_require_grad(unit_memory):
    x = torch.ones(1, 5, requires_grad=True)
    momentum_update_(unit_memory, x, torch.tensor([0]))
    assert not unit_memory.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": torch.ones(6, 5, requires_grad=True)}, ValueError, "memory must not require grad"),
        ({"memory": np.ones((6, 5), "f")}, TypeError, "memory must be a torch tensor, .* got ndarray"),
        ({"memory": torch.ones(6, 4)}, ValueError, "x must have 4 columns like memory, got 5"),
        ({"targets": torch.tensor([0, 6])}, ValueError, r"targets must lie in \[0, 6\), got 6"),
        ({"targets": torch.tensor([0, -2])}, ValueError, r"targets must lie in \[0, 6\), got -2"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets must have one entry for each row of x \(2\), got 1"),
        ({"momentum": 1.2}, ValueError, r"momentum must lie in \[0, 1\], got 1.2"),
        ({"rule": "mean"}, ValueError, "rule must be one of 'sequential', 'hard', got 'mean'"),
        ({"x": torch.tensor([[1.0] * 5, [torch.nan] * 5])}, ValueError, "x must be finite, .*first: row 1"),
    ],
)
def test_rejects_and_leaves_the_memory_alone(change, error, message):
    arguments = {"memory": torch.ones(6, 5), "x": torch.ones(2, 5), "targets": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=f"momentum_update_: {message}"):
        momentum_update_(**arguments)
    assert (torch.as_tensor(arguments["memory"]) == 1).all()

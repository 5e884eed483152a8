# SPDX-License-Identifier: Apache-2.0
"""Memory updates: published numbers, every rule by its definition, order, ties, and what must stay untouched."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.momentum_update import RULES, momentum_update_

PUBLISHED = {"cm": "sequential", "hard": "hard"}


@pytest.mark.parametrize("name", ["cm_all_b50_d48_k23", "cm_random_b50_d48_k23", "cm_one_b64_d96_k40"])
@pytest.mark.parametrize("published", ["cm", "hard"])
@pytest.mark.parametrize("momentum", [0.1, 0.2, 0.9])
def test_golden(golden, name, published, momentum):
    file = golden(name)
    memory = file.tensor("features_before")
    momentum_update_(
        memory, file.tensor("inputs"), file.tensor("targets"), momentum=momentum, rule=PUBLISHED[published]
    )
    expected = file.tensor(f"features_after_{published}_t0.05_m{momentum}")
    torch.testing.assert_close(memory, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("published", ["cm", "hard"])
@pytest.mark.parametrize("momentum", [0.1, 0.2, 0.9])
def test_golden_ten_steps(golden, published, momentum):
    file = golden("cm_trajectory_b32_d64_k24")
    memory = file.tensor("features_before")
    after = dict(zip((1, 2, 3, 5, 10), file.tensor(f"features_each_step_{published}_m{momentum}"), strict=True))
    for step, (x, targets) in enumerate(zip(file.tensor("inputs"), file.tensor("targets"), strict=True), 1):
        momentum_update_(memory, x, targets, momentum=momentum, rule=PUBLISHED[published])
        if step in after:
            torch.testing.assert_close(memory, after[step], atol=5e-6 if step == 10 else 1e-6, rtol=0)


DCCC = {
    "wgm_tau0.03_s0.3_m0.1": {"rule": "weighted", "weight_temperature": 0.03, "momentum": 0.1},
    "wgm_tau0.07_s0.1_m0.1": {"rule": "weighted", "weight_temperature": 0.07, "momentum": 0.1},
    "wgm_tau0.6_s0.1_m0.1": {"rule": "weighted", "weight_temperature": 0.6, "momentum": 0.1},
    "wgm_tau0.09_s0.1_m0.2": {"rule": "weighted", "weight_temperature": 0.09, "momentum": 0.2},
    "hard_tau0.09_s0.1_m0.2": {"rule": "hard", "momentum": 0.2},
    "avg_tau0.09_s0.1_m0.2": {"rule": "mean", "momentum": 0.2},
    "cc_tau0.09_s0.1_m0.2": {"rule": "sequential", "momentum": 0.2},
}


@pytest.mark.parametrize("tag", DCCC)
def test_golden_dccc(golden, tag):
    file = golden("dccc_memory_b48_d64_k30")
    memory = file.tensor("features_before")
    momentum_update_(memory, file.tensor("inputs"), file.tensor("targets"), **DCCC[tag])
    torch.testing.assert_close(memory, file.tensor(f"features_after_{tag}"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["repeated_indices", "unused_labels", "unnormalised"])
def test_golden_instance_rows(golden, name):
    """The published instance memory uses its samples as they are."""
    file = golden(f"hybrid_{name}_n300_b48_d64")
    memory, rows = file.tensor("features_before"), file.tensor("rows")
    before = memory.clone()
    momentum_update_(memory, file.tensor("inputs"), file.tensor("indexes"), momentum=0.2, rule="row", normalize=False)
    torch.testing.assert_close(memory[rows], file.tensor("features_after_rows_t0.05_m0.2"), atol=1e-6, rtol=0)
    others = torch.ones(len(memory), dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(memory[others], before[others])


X = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.0, 0.8]])
TOYS = [
    ({"rule": "weighted", "weight_temperature": 0.5}, (0.827929, 0.251910, 0.501074)),
    ({"rule": "weighted", "weight_temperature": 0.03}, (0.664968, 0.000713, 0.746871)),
    ({"rule": "weighted", "weight_temperature": 1e-4}, (0.664364, 0.0, 0.747409)),
    ({"rule": "weighted", "weight_temperature": float("inf")}, (0.851258, 0.314849, 0.419798)),
    ({"rule": "hard"}, (0.664364, 0.0, 0.747409)),
    ({"rule": "mean"}, (0.851258, 0.314849, 0.419798)),
    ({"rule": "index", "index": torch.tensor([1, -1])}, (0.664364, 0.0, 0.747409)),
    ({"rule": "sequential"}, (0.653552, 0.057648, 0.754683)),
    ({"rule": "row"}, (0.653552, 0.057648, 0.754683)),
    ({"rule": "sequential", "momentum": 0.2}, (0.710361, 0.107837, 0.695528)),
    ({"rule": "push"}, (0.923939, -0.341360, 0.172656)),
    ({"rule": "push_sequential"}, (0.923939, -0.341360, 0.172656)),
    ({"rule": "push", "push_weight": 0.0}, (0.947794, 0.0, 0.318884)),
]


@pytest.mark.parametrize(("settings", "expected"), TOYS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_by_hand(settings, expected, backend):
    rows = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.7071]]))
    memory = momentum_update_(rows.clone(), X, torch.tensor([0, 0]), backend=backend, **settings)
    torch.testing.assert_close(memory[0], torch.tensor(expected), atol=1e-6, rtol=0)
    assert torch.equal(memory[1], rows[1])


def unit(v):
    return v / max(np.linalg.norm(v), 1e-12)


def by_definition(memory, x, targets, *, momentum, rule, index=None, weight_temperature=None, push_weight=0.2, **_):
    """Row after row, in order of their first samples."""
    before = memory.astype(np.float64)
    memory = before.copy()
    x = np.stack([unit(v) for v in x.astype(np.float64)]) if len(x) else x
    for row in dict.fromkeys(t for t in targets if t >= 0):
        m = before[row]
        samples = [b for b, target in enumerate(targets) if target == row]
        s = x[samples] @ m
        if rule in ("sequential", "row"):
            for b in samples:
                memory[row] = unit(momentum * memory[row] + (1 - momentum) * x[b])
        elif rule in ("push", "push_sequential"):
            hardest, least = x[samples[s.argmin()]], s.min()
            step = (1 - momentum) * (1 - least) * (m - hardest)
            others = (before if rule == "push" else memory).copy()
            likeness = others @ m
            likeness[row] = -np.inf
            if len(memory) > 1:
                step += push_weight * (1 + likeness.max()) * (m + others[likeness.argmax()])
            memory[row] = unit(m - step)
        else:
            if rule == "index":
                samples, weights = ([index[row]] if index[row] >= 0 else []), np.ones(1)
            elif rule == "hard":
                samples, weights = [samples[s.argmin()]], np.ones(1)
            else:
                weights = np.exp(-(s - s.min()) / (weight_temperature or np.inf))
            if samples:
                memory[row] = unit(momentum * m + (1 - momentum) * (weights / weights.sum()) @ x[samples])
    return memory


def settings_of(rule, targets, c):
    if rule == "weighted":
        return {"weight_temperature": 0.2}
    if rule == "index":  # the last sample of every other row
        index = torch.full((c,), -1)
        for b, row in enumerate(targets.tolist()):
            index[row] = b if row >= 0 and row % 2 == 0 else index[row]
        return {"index": index}
    return {}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 3), (17, 5, 1), (40, 7, 19)])
def test_matches_definition(b, c, d, rule):
    generator = torch.Generator().manual_seed(b)
    memory = F.normalize(torch.randn(c, d, generator=generator, dtype=torch.float64))
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, c, (b,), generator=generator)
    settings = {"momentum": 0.3, "rule": rule, **settings_of(rule, targets, c)}
    expected = by_definition(memory.numpy(), x.numpy(), targets.tolist(), **settings)
    if d > 1:  # in one dimension every row is as near as the next, and rounding decides
        found = momentum_update_(memory.float(), x.float(), targets, **settings)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    for backend in ("auto", "reference"):
        found = momentum_update_(memory.clone(), x, targets, backend=backend, **settings)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-14)


def test_push_sequential_sees_rows_that_moved():
    rows = torch.eye(3)[[0, 1]]
    x, targets = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1])
    for rule, moved in (("push", False), ("push_sequential", True)):
        found = momentum_update_(rows.clone(), x, targets, rule=rule)
        assert (found[1, 2] != 0) == moved, "row 0 moves along the third axis, and only then pushes row 1 there"
        assert found[0, 2] > 0.9


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cluster_means_follow_their_rows(backend):
    generator = torch.Generator().manual_seed(4)
    rows = F.normalize(torch.randn(9, 6, generator=generator, dtype=torch.float64))
    labels = torch.tensor([0, 2, 2, -1, 0, 3, 2, 0, 3])
    sizes = torch.tensor([3, 0, 3, 2])

    def means():
        return torch.stack([rows[labels == label].sum(0) / max(sizes[label], 1) for label in range(4)])

    moved = means()
    for step in range(3):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        targets = torch.tensor([4, 3, 0, 4, -1, 1, 0, 5 + step])
        plain = momentum_update_(rows.clone(), x, targets, rule="sequential")
        momentum_update_(
            rows, x, targets, rule="row", labels=labels, cluster_sizes=sizes, cluster_means=moved, backend=backend
        )
        assert torch.equal(rows, plain) or backend == "reference"
        torch.testing.assert_close(rows, plain, atol=1e-14, rtol=0)
        torch.testing.assert_close(moved, means(), atol=1e-14, rtol=0)


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


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "push_sequential"])
def test_bits_do_not_depend_on_the_company(rule):
    """Other samples, other rows, gaps in the batch: row 2 sees its own samples in their order, and nothing else."""
    generator = torch.Generator().manual_seed(3)
    rows = F.normalize(torch.randn(5, 40, generator=generator))
    x, others = torch.randn(6, 40, generator=generator), torch.randn(24, 40, generator=generator)
    targets = torch.full((6,), 2)
    alone = momentum_update_(rows.clone(), x, targets, rule=rule, **settings_of(rule, targets, 5))[2]
    targets = torch.tensor([0, 1, 3, -1] * 6)
    others[1::4], targets[1::4] = x, 2
    more = torch.cat([rows, -rows[2].expand(5, 40)])  # the new rows are as far as can be
    found = momentum_update_(more, others, targets, rule=rule, **settings_of(rule, targets, 10))
    assert torch.equal(found[2], alone)


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


@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_move(unit_memory, rule):
    before = unit_memory.clone()
    nobody = torch.zeros(0, dtype=torch.int64)
    settings = {"rule": rule, **settings_of(rule, nobody, 6)}
    momentum_update_(unit_memory, torch.zeros(0, 5), nobody, **settings)
    momentum_update_(unit_memory, torch.ones(2, 5), torch.tensor([-1, -1]), **settings)
    assert torch.equal(unit_memory, before)
    empty = torch.zeros(0, 5)
    momentum_update_(empty, torch.ones(2, 5), torch.tensor([-1, -1]), rule=rule, **settings_of(rule, nobody, 0))


def test_squares_that_overflow_are_not_an_error(unit_memory):
    before = unit_memory.clone()
    momentum_update_(unit_memory, torch.full((1, 5), 1e30), torch.tensor([2]))
    torch.testing.assert_close(unit_memory, before)  # as published: a length of infinity leaves nothing of the sample


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_memory_is_computed_in_float32_and_rounded_once(dtype, rule):
    generator = torch.Generator().manual_seed(1)
    rows = F.normalize(torch.randn(5, 19, generator=generator)).to(dtype)
    x, targets = torch.randn(17, 19, generator=generator), torch.randint(-1, 5, (17,), generator=generator)
    x[2], x[6] = 0, 1e5  # neither is to be lost in half precision
    settings = {"rule": rule, **settings_of(rule, targets, 5)}
    expected = momentum_update_(rows.float(), x, targets, backend="reference", **settings)
    found = momentum_update_(rows.clone(), x, targets, backend="reference", **settings)
    # rows of "push_sequential" read each other, rounded as they are stored
    slack = torch.finfo(dtype).eps if rule == "push_sequential" else 0
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=slack)


@pytest.mark.parametrize("rule", ["sequential", "hard", "mean", "push", "push_sequential"])
def test_zeros_and_large_numbers_make_no_nan_of_a_half_row(rule):
    for x in (torch.zeros(1, 3), torch.full((1, 3), 1e5)):
        rows = torch.eye(3).half()
        momentum_update_(rows, x, [0], momentum=0.5, rule=rule, backend="reference")
        assert torch.isfinite(rows).all()


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.tensor([1]), np.ones(1)])
def test_found_inf_skips_the_update(unit_memory, bad):
    before = unit_memory.clone()
    momentum_update_(unit_memory, torch.full((1, 5), torch.inf), torch.tensor([0]), found_inf=bad)
    assert torch.equal(unit_memory, before)
    momentum_update_(unit_memory, torch.ones(1, 5), torch.tensor([0]), found_inf=bad * 0)
    assert not torch.equal(unit_memory, before)


def test_takes_features_that_require_grad(unit_memory):
    x = torch.ones(1, 5, requires_grad=True)
    momentum_update_(unit_memory, x, torch.tensor([0]))
    assert not unit_memory.requires_grad


ROW = {"rule": "row", "labels": [0, 0, 0, 0, 1, 1], "cluster_sizes": [4, 2], "cluster_means": torch.ones(2, 5)}


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
        ({"rule": "last"}, ValueError, "rule must be one of 'sequential', 'hard', 'mean', .*, got 'last'"),
        ({"push_weight": -0.1}, ValueError, "push_weight must lie in"),
        ({"rule": "weighted"}, ValueError, "weight_temperature must be given with rule='weighted'"),
        ({"weight_temperature": 0.1}, ValueError, "weight_temperature must be None without rule='weighted'"),
        ({"rule": "weighted", "weight_temperature": 0.0}, ValueError, "weight_temperature must be positive"),
        ({"rule": "index"}, ValueError, "index must be given with rule='index'"),
        ({"index": [0] * 6}, ValueError, "index must be None without rule='index'"),
        ({"rule": "index", "index": [0, 1]}, ValueError, r"index must have one entry .* \(6\), got 2"),
        ({"rule": "index", "index": [0, 1, -1, 2, -1, -1]}, ValueError, r"index must lie in \[0, 2\), got 2"),
        (
            {"rule": "index", "index": [0, 0, -1, -1, -1, -1]},
            ValueError,
            "index must name .* got 0 for row 1, a sample",
        ),
        ({"labels": [0] * 6}, ValueError, "labels, cluster_sizes and cluster_means must be given together"),
        ({**ROW, "rule": "hard"}, ValueError, "labels, cluster_sizes and cluster_means must .* got rule='hard'"),
        ({**ROW, "labels": [0, 2, 0, 0, 0, 0]}, ValueError, r"labels must lie in \[0, 2\), got 2"),
        (
            {**ROW, "cluster_sizes": [0, 2]},
            ValueError,
            "cluster_sizes must be at least 1 where a row moves, got 0 for label 0",
        ),
        ({**ROW, "cluster_sizes": [6]}, ValueError, "cluster_sizes must have one entry"),
        ({**ROW, "cluster_means": torch.ones(2, 4)}, ValueError, "cluster_means must have 5 columns"),
        ({**ROW, "cluster_means": torch.ones(2, 5, requires_grad=True)}, ValueError, "cluster_means must not require"),
        (
            {"x": torch.tensor([[1.0] * 5, [torch.nan] * 5]), "found_inf": torch.zeros(1)},
            ValueError,
            "x must be finite",
        ),
        ({"x": torch.ones(2, 5, device="meta")}, ValueError, "x must be on cpu like memory, got meta"),
        (
            {"x": torch.full((2, 5), 1e200, dtype=torch.float64)},
            ValueError,
            "x in float32 must be finite, .*first: row 0",
        ),
        ({"found_inf": 0.0}, TypeError, "found_inf must be a tensor or an array with __dlpack__, got float"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf must hold one number, got shape \(2,\)"),
        ({"found_inf": torch.zeros(1, device="meta")}, ValueError, "found_inf must be on cpu like memory, got meta"),
        ({"memory": torch.zeros(0, 5)}, ValueError, r"targets must lie in \[0, 0\), got"),
        ({"x": torch.tensor([[1.0] * 5, [torch.nan] * 5])}, ValueError, "x must be finite, .*first: row 1"),
    ],
)
def test_rejects_and_leaves_the_memory_alone(change, error, message):
    arguments = {"memory": torch.ones(6, 5), "x": torch.ones(2, 5), "targets": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=f"momentum_update_: {message}"):
        momentum_update_(**arguments)
    assert (torch.as_tensor(arguments["memory"]) == 1).all()
    assert (ROW["cluster_means"] == 1).all()

# SPDX-License-Identifier: Apache-2.0
"""InstanceMemory against the published hybrid memories of SpCL and CACL, and what an epoch does to it."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u import InstanceMemory

SETTINGS = [(0.05, 0.1), (0.05, 0.2), (0.05, 0.9), (0.1, 0.2)]


def make(case, temp, momentum):
    """The published class takes its features as they come; the network has normalised them, or has not."""
    settings = {"temp": temp, "momentum": momentum, "normalize": False}
    memory = InstanceMemory.from_features(case.tensor("features_before"), **settings)
    memory.features.copy_(case.tensor("features_before"))
    memory.set_labels(case.tensor("labels"))
    return memory


def one_step(memory, x, rows, form, **settings):
    x = x.clone().requires_grad_()
    if form == "one call":
        loss = memory(x, rows, **settings)
        loss.backward()
    else:
        loss = memory.loss(x, rows, **settings)
        loss.backward()
        memory.update_(x, rows)
    return loss.detach(), x.grad


@pytest.mark.parametrize("form", ["one call", "apart"])
@pytest.mark.parametrize(("temp", "momentum"), SETTINGS)
@pytest.mark.parametrize("name", ["repeated_indices", "unused_labels", "unnormalised"])
def test_equals_the_published_class(golden, name, temp, momentum, form):
    case = golden(f"hybrid_{name}_n300_b48_d64")
    memory, rows, tag = make(case, temp, momentum), case.tensor("rows"), f"t{temp}_m{momentum}"
    loss, gradient = one_step(memory, case.tensor("inputs"), case.tensor("indexes"), form)
    torch.testing.assert_close(loss, case.tensor(f"loss_{tag}"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, case.tensor(f"grad_{tag}"), rtol=1e-4, atol=2e-6)
    after = case.tensor("features_before")
    after[rows] = case.tensor(f"features_after_rows_{tag}")
    torch.testing.assert_close(memory.features, after, rtol=0, atol=1e-6)
    running = memory.cluster_means.clone()
    memory.set_labels(memory.labels)
    torch.testing.assert_close(running, memory.cluster_means, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["one call", "apart"])
def test_ten_steps_equal_the_published_trajectory(golden, form):
    case = golden("hybrid_trajectory_n200_b32_d48")
    memory = make(case, 0.05, 0.2)
    for step in range(10):
        loss, gradient = one_step(memory, case.tensor("inputs")[step], case.tensor("indexes")[step], form)
        torch.testing.assert_close(loss, case.tensor("loss")[step], rtol=1e-5, atol=1e-6)
        if step + 1 in (1, 5, 10):
            after = case.tensor(f"features_after_step{step + 1}")
            torch.testing.assert_close(memory.features, after, rtol=0, atol=5e-6 if step == 9 else 1e-6)
    torch.testing.assert_close(gradient, case.tensor("grad_last"), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("temp", "momentum"), [(0.05, 0.2), (0.1, 0.1)])
def test_focal_equals_the_published_cacl(golden, temp, momentum):
    case = golden("cacl_memory_n240_b40_d64")
    memory, tag = make(case, temp, momentum), f"back0_t{temp}_m{momentum}"
    loss, gradient = one_step(memory, case.tensor("inputs"), case.tensor("indexes"), "one call", focal=4.0)
    torch.testing.assert_close(loss, case.tensor(f"loss_{tag}"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, case.tensor(f"grad_inputs_{tag}"), rtol=1e-4, atol=2e-6)
    moved = memory.features[case.tensor("rows")]
    torch.testing.assert_close(moved, case.tensor(f"features_after_rows_{tag}"), rtol=0, atol=1e-6)


@pytest.fixture
def small():
    generator = torch.Generator().manual_seed(0)
    memory = InstanceMemory.from_features(
        torch.randn(6, 4, generator=generator), source_centroids=torch.randn(3, 4, generator=generator)
    )
    memory.set_labels(torch.tensor([0, 2, 2, -1, 0, 3]))
    return memory, torch.randn(5, 4, generator=generator)


def test_source_classes_come_first(small):
    memory, x = small
    assert memory.labels.tolist() == [0, 1, 2, 3, 5, 5, -1, 3, 6]
    assert memory.cluster_sizes.tolist() == [1, 1, 1, 2, 0, 2, 1]
    torch.testing.assert_close(memory.cluster_means[:3], memory.features[:3])
    torch.testing.assert_close(memory.cluster_means[5], memory.features[4:6].mean(0))
    torch.testing.assert_close(memory.features.norm(dim=1), torch.ones(9))
    by_hand = F.normalize(x) @ memory.cluster_means[[0, 1, 2, 3, 5, 6]].T / 0.05
    expected = F.cross_entropy(by_hand, torch.tensor([0, 2, 3, 4, 5]))
    memory.epsilon = 0.0
    torch.testing.assert_close(memory.loss(x, torch.tensor([0, 2, 7, 4, 8])), expected)


def test_source_and_target_in_one_backward_both_see_the_old_rows(small):
    memory, x = small
    start = memory.features.clone(), memory.cluster_means.clone()
    rows = torch.tensor([1, 1]), torch.tensor([3, 7, 4])
    apart = []
    for batch, row in zip(x.split([2, 3]), rows, strict=True):
        leaf = batch.clone().requires_grad_()
        memory.loss(leaf, row).backward()
        apart.append(leaf.grad)
    leaf = x.clone().requires_grad_()
    (memory(leaf[:2], rows[0]) + memory(leaf[2:], rows[1])).backward()
    torch.testing.assert_close(leaf.grad, torch.cat(apart))
    assert not torch.equal(memory.features, start[0])
    assert torch.equal(memory.features[[0, 2, 5, 6, 8]], start[0][[0, 2, 5, 6, 8]])
    torch.testing.assert_close(memory.cluster_means[1], memory.features[1])


def test_images_without_a_cluster_take_no_part(small):
    memory, x = small
    torch.testing.assert_close(memory.loss(x, torch.tensor([6, 0, -1, 6, 6])), memory.loss(x[1:2], torch.tensor([0])))


def test_found_inf_skips_rows_and_means(small):
    memory, x = small
    before = memory.features.clone(), memory.cluster_means.clone()
    memory.update_(x * torch.inf, torch.arange(5), found_inf=torch.ones(1))
    assert torch.equal(memory.features, before[0])
    assert torch.equal(memory.cluster_means, before[1])


def test_a_loaded_memory_goes_on_where_the_saved_one_was(small):
    memory, x = small
    memory.update_(x, torch.tensor([3, 3, 0, 8, -1]))
    assert set(memory.state_dict()) == {"features", "labels", "cluster_means"}
    other = InstanceMemory(4, 9, num_source_classes=3)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.features, memory.features)
    assert torch.equal(other.cluster_sizes, memory.cluster_sizes)
    assert torch.equal(other.cluster_means, memory.cluster_means)


def test_a_file_without_the_means_has_them_made_anew(small):
    """As earlier run folders hold it."""
    memory, x = small
    memory.update_(x, torch.tensor([3, 3, 0, 8, -1]))
    state = {name: tensor for name, tensor in memory.state_dict().items() if name != "cluster_means"}
    other = torch.nn.ModuleDict({"memory": InstanceMemory(4, 2, num_source_classes=3)})
    other.load_state_dict({f"memory.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(other["memory"].cluster_sizes, memory.cluster_sizes)
    torch.testing.assert_close(other["memory"].cluster_means, memory.cluster_means)


@pytest.mark.filterwarnings("error")  # the reference says that it is slow
def test_means_have_the_dtype_of_the_rows(small):
    memory, x = small
    memory.double().set_labels([0, 2, 2, -1, 0, 3])
    assert memory.cluster_means.dtype == torch.float64
    memory.update_(x.double(), torch.arange(5))


def test_no_update_without_gradients(small):
    memory, x = small
    before = memory.features.clone()
    memory(x, torch.arange(5))
    with torch.no_grad():
        memory(x.requires_grad_(), torch.arange(5))
    assert torch.equal(memory.features, before)


def test_refuses(small):
    memory, x = small
    with pytest.raises(ValueError, match="InstanceMemory: labels must be set"):
        InstanceMemory(4, 9).loss(x, torch.arange(5))
    with pytest.raises(ValueError, match=r"InstanceMemory: rows must lie in \[0, 9\), got 9"):
        memory.loss(x, torch.tensor([0, 9, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"set_labels: labels must have one entry for each row of .* \(6\), got 9"):
        memory.set_labels(torch.arange(9))
    with pytest.raises(ValueError, match="set_labels: labels must lie in"):
        memory.set_labels(torch.full((6,), -2))
    for setting in ({"temp": 0.0}, {"momentum": 1.1}, {"epsilon": 1.0}, {"num_source_classes": -1}):
        with pytest.raises(ValueError, match=f"InstanceMemory: {next(iter(setting))} must"):
            InstanceMemory(4, 9, **setting)

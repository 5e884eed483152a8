# SPDX-License-Identifier: Apache-2.0
"""ProxyMemory against the published CAP memory: its rows, its losses, its updates."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u import ProxyMemory


def stacked(case, *, cameras):
    return torch.cat([case.tensor(f"prototypes_cam{camera}") for camera in range(cameras)])


@pytest.mark.parametrize("name", ["n240_eps0.6", "n300_eps0.5"])
def test_rows_equal_the_published_grouping(golden, name):
    case = golden(f"cap_grouping_{name}")
    memory = ProxyMemory.from_features(case.tensor("features_raw"), case.tensor("labels"), case.tensor("cams"))
    torch.testing.assert_close(memory.features, stacked(case, cameras=case.meta["params"]["cams"]), rtol=0, atol=1e-6)
    rows = memory.rows(case.tensor("labels"), case.tensor("cams"))
    kept = case.tensor("labels") >= 0
    assert torch.equal(rows >= 0, kept)
    assert torch.equal(memory.clusters[rows[kept]], case.tensor("labels")[kept])
    assert torch.equal(memory.cameras[rows[kept]], case.tensor("cams")[kept])
    assert rows[kept].unique().tolist() == list(range(memory.num_proxies))


@pytest.mark.parametrize("form", ["one call", "apart"])
@pytest.mark.parametrize(("terms", "inter_weight"), [("intra", 0.0), ("intra_plus_inter", 0.5)])
@pytest.mark.parametrize("name", ["many", "few"])
def test_steps_equal_the_published_class(golden, name, terms, inter_weight, form):
    case = golden(f"cap_losses_{name}_proxies")
    labels, cameras = case.tensor("pseudo_labels"), case.tensor("cams")
    proxies = stacked(case, cameras=case.meta["params"]["cams"])
    settings = {"inter_weight": inter_weight, "reduction": "camera", "compat": True}
    memory = ProxyMemory.from_features(torch.randn(len(labels), proxies.shape[1]), labels, cameras, **settings)
    memory.features.copy_(proxies)
    rows = memory.rows(labels, cameras)
    for step, (x, indexes) in enumerate(zip(case.tensor("inputs"), case.tensor("indexes"), strict=True)):
        x, targets = x.clone().requires_grad_(), rows[indexes]
        if form == "one call":
            loss = memory(x, targets)
            loss.backward()
        else:
            loss = memory.loss(x, targets)
            loss.backward()
            memory.update_(x, targets)
        torch.testing.assert_close(loss.detach(), case.tensor(f"loss_{terms}")[step], rtol=1e-5, atol=1e-6)
        name = f"memory_after_step{step + 1}_{terms}"
        if name in case:
            torch.testing.assert_close(memory.features, case.tensor(name), rtol=0, atol=1e-6)


@pytest.fixture
def small():
    """Cameras 3 and 9, clusters 0, 2 and 5; camera 9 has not seen cluster 2; two outliers."""
    generator = torch.Generator().manual_seed(0)
    labels, cameras = torch.tensor([5, 0, 2, -1, 0, 5, 5, -1]), torch.tensor([9, 9, 3, 3, 3, 3, 9, 9])
    features = torch.randn(8, 6, generator=generator)
    return ProxyMemory.from_features(features, labels, cameras), features, labels, cameras


def test_gaps_outliers_and_absent_pairs(small):
    memory, features, labels, cameras = small
    assert memory.cameras.tolist() == [3, 3, 3, 9, 9]
    assert memory.clusters.tolist() == [0, 2, 5, 0, 5]
    assert memory.rows(labels, cameras).tolist() == [4, 3, 1, -1, 0, 2, 4, -1]
    assert memory.rows(torch.tensor([2, 7, 0]), torch.tensor([9, 3, 10])).tolist() == [-1, -1, -1]
    both = F.normalize(F.normalize(features[[0, 6]]).mean(0), dim=0)
    torch.testing.assert_close(memory.features[4], both)


def test_one_camera_is_cluster_contrast(small):
    _, features, labels, _ = small
    memory = ProxyMemory.from_features(features, labels, torch.zeros(8, dtype=torch.int64), inter_weight=0.0)
    targets = memory.rows(labels, torch.zeros(8, dtype=torch.int64))
    expected = F.cross_entropy(F.normalize(features) @ memory.features.T / 0.07, targets, ignore_index=-1)
    torch.testing.assert_close(memory.loss(features, targets), expected)


def test_no_term_is_a_loss_of_zero(small):
    memory, features, labels, cameras = small
    memory.intra_weight = memory.inter_weight = 0.0
    x = features.clone().requires_grad_()
    memory.loss(x, memory.rows(labels, cameras)).backward()
    assert (x.grad == 0).all()


def test_outliers_change_nothing_and_found_inf_skips(small):
    memory, features, labels, cameras = small
    before, rows = memory.features.clone(), memory.rows(labels, cameras)
    memory.update_(features, torch.full_like(rows, -1))
    memory.update_(features * torch.inf, rows, found_inf=torch.ones(1))
    assert torch.equal(memory.features, before)
    memory.update_(features, rows)
    assert not torch.equal(memory.features, before)


@pytest.mark.parametrize("proxies", [0, 5, 9])
def test_restart_is_a_new_memory_of_any_number_of_rows(small, proxies):
    expected, features, labels, cameras = small
    memory = ProxyMemory(6, proxies, temp=0.3)
    memory.restart(features, labels, cameras)
    assert memory.num_proxies == 5
    assert memory.temp == 0.3
    for name, buffer in expected.named_buffers():
        assert torch.equal(getattr(memory, name), buffer)


def test_all_state_is_in_the_state_dict(small):
    memory = small[0]
    other = ProxyMemory(6, 5)
    other.load_state_dict(memory.state_dict())
    for name in ("features", "clusters", "cameras"):
        assert torch.equal(getattr(other, name), getattr(memory, name))


def test_refuses(small):
    memory, features, labels, cameras = small
    with pytest.raises(ValueError, match=r"ProxyMemory\.from_features: labels must have one entry"):
        ProxyMemory.from_features(features, labels[:3], cameras)
    with pytest.raises(ValueError, match=r"ProxyMemory\.restart: labels must have one entry"):
        memory.restart(features, labels[:3], cameras)
    with pytest.raises(ValueError, match=r"ProxyMemory\.restart: features must have 6 columns like the memory, got 5"):
        memory.restart(features[:, :5], labels, cameras)
    with pytest.raises(ValueError, match=r"ProxyMemory\.from_features: cameras must lie in"):
        ProxyMemory.from_features(features, labels, cameras - 4)
    with pytest.raises(TypeError, match=r"ProxyMemory\.from_features: labels must hold integers"):
        ProxyMemory.from_features(features, labels.float(), cameras)
    with pytest.raises(ValueError, match=r"ProxyMemory: targets must lie in \[0, 5\), got 5"):
        memory.loss(features, torch.full((8,), 5))
    for setting in ({"temp": 0.0}, {"momentum": 1.1}, {"intra_weight": -1.0}, {"inter_weight": -1.0}):
        with pytest.raises(ValueError, match=f"ProxyMemory: {next(iter(setting))} must"):
            ProxyMemory(6, 5, **setting)

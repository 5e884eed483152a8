# SPDX-License-Identifier: Apache-2.0
"""CAP with Cluster Contrast, both readings: each half is held to the numbers of the method that it comes from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.cap_cluster_contrast import CAPClusterContrast, CAPClusterContrastConfig
from fastreid_u.recipes.cap_cluster_contrast_proxy import CAPClusterContrastProxy, CAPClusterContrastProxyConfig
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig

READINGS = [CAPClusterContrast, CAPClusterContrastProxy]
SMALL = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=3,
    epochs=2, workers=0, k1=8, k2=3, center_per_camera=True, calibrate_bn=2, eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


def world(count=60, clusters=6, cameras=3, dim=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % clusters
    camids = torch.randint(cameras, (count,), generator=generator)
    centres = torch.randn(clusters, dim, generator=generator)
    return F.normalize(centres[labels] + torch.randn(count, dim, generator=generator)), labels, camids


def begun(recipe_class, features, labels, camids, epoch, **settings):
    recipe = recipe_class(recipe_class.Config(**settings), Images(len(labels), camids))
    network = nn.Identity()
    network.num_features = features.shape[1]
    recipe.build(network)
    targets = recipe.begin_epoch(features, labels, epoch)
    return recipe, Batch((), torch.arange(len(labels)), targets, camids, epoch=epoch)


def step(recipe, x, batch):
    x = x.clone().requires_grad_()
    loss = recipe.loss(x, batch)
    loss.backward()
    recipe.update(x.detach(), batch)
    return loss.detach(), x.grad


def test_it_begins_as_cluster_contrast():
    given = world()
    ours, batch = begun(CAPClusterContrast, *given, epoch=4)
    theirs, _ = begun(ClusterContrast, *given, epoch=4)
    for a, b in zip(step(ours, given[0], batch), step(theirs, given[0], batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.memory.features, theirs.memory.features)


@pytest.mark.parametrize("name", ["cap_losses_many_proxies", "cap_losses_few_proxies"])
@pytest.mark.parametrize(("epoch", "terms"), [(4, "intra"), (5, "intra_plus_inter")])
def test_the_proxy_reading_has_caps_numbers(golden, name, epoch, terms):
    stored = golden(name)
    labels, camids = stored.tensor("pseudo_labels"), stored.tensor("cams")
    pairs = list(zip(camids.tolist(), labels.tolist(), strict=True))
    row = {pair: i for i, pair in enumerate(sorted({pair for pair in pairs if pair[1] >= 0}))}
    prototypes = torch.cat([stored.tensor(f"prototypes_cam{camid}") for camid in range(stored.meta["params"]["cams"])])
    features = prototypes[[row.get(pair, 0) for pair in pairs]]
    recipe, _ = begun(CAPClusterContrastProxy, features, labels, camids, epoch, compat=True)
    for i, (x, rows) in enumerate(zip(stored.tensor("inputs"), stored.tensor("indexes"), strict=True)):
        loss, grad = step(recipe, x, Batch((), rows, labels[rows], camids[rows], epoch=epoch))
        torch.testing.assert_close(loss, stored.tensor(f"loss_{terms}")[i], rtol=1e-5, atol=1e-6)
        theirs = stored.tensor(f"grad_{terms}")[i]
        torch.testing.assert_close(grad, theirs - (theirs * x).sum(1, keepdim=True) * x, rtol=1e-4, atol=2e-6)
    last = stored.tensor(f"memory_after_step{i + 1}_{terms}")
    torch.testing.assert_close(recipe.proxies.features, last, rtol=0, atol=1e-6)


def test_both_halves_add_up_and_both_memories_move():
    features, labels, camids = world()
    whole, batch = begun(CAPClusterContrast, features, labels, camids, 5, inter_weight=0.3, cluster_weight=2.0)
    clusters, _ = begun(ClusterContrast, features, labels, camids, 5)
    proxies, _ = begun(CAPClusterContrastProxy, features, labels, camids, 5, inter_weight=0.3)
    within, earlier = begun(CAPClusterContrastProxy, features, labels, camids, 4, inter_weight=0.3)
    parts = [clusters.loss(features, batch), proxies.loss(features, batch), within.loss(features, earlier)]
    torch.testing.assert_close(whole.loss(features, batch), 2 * parts[0] + parts[1] - parts[2])
    before = whole.memory.features.clone(), whole.proxies.features.clone()
    whole.update(features, batch)
    assert not torch.equal(whole.memory.features, before[0])
    assert not torch.equal(whole.proxies.features, before[1])


def test_the_loss_is_a_mean_over_images_or_as_published_a_sum_over_cameras():
    features, labels, camids = world()
    ours, batch = begun(CAPClusterContrastProxy, features, labels, camids, 5, hard_negatives=1)
    theirs, _ = begun(CAPClusterContrastProxy, features, labels, camids, 5, hard_negatives=1, compat=True)

    def of_camera(recipe, camid):
        own = camids == camid
        return recipe.loss(features[own], Batch((), batch.indices[own], labels[own], camids[own], epoch=5))

    each = torch.stack([of_camera(ours, camid) for camid in range(3)])
    torch.testing.assert_close(theirs.loss(features, batch), each.sum())
    torch.testing.assert_close(ours.loss(features, batch), (each * camids.bincount()).sum() / 60)


def test_one_camera_is_cluster_contrast():
    features, labels, _ = world()
    one = torch.full_like(labels, 7)
    proxies, batch = begun(CAPClusterContrastProxy, features, labels, one, 0)
    clusters, _ = begun(ClusterContrast, features, labels, one, 0, temp=0.07, momentum=0.2)
    for a, b in zip(step(proxies, features, batch), step(clusters, features, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(proxies.proxies.features, clusters.memory.features)


@pytest.mark.parametrize("reading", READINGS)
def test_data_without_cameras_are_refused(reading):
    with pytest.raises(ValueError, match=f"method '{reading.name}' needs images of two cameras or more"):
        reading(reading.Config(), Images(4))


@pytest.mark.parametrize("setting", [{"temp": 0.5}, {"momentum": 0.9}, {"use_hard": True}], ids=str)
def test_the_proxy_reading_refuses_settings_of_a_memory_that_it_has_not(setting):
    with pytest.raises(ValueError, match=r"must be left alone without a memory of clusters .*proxy_temp"):
        CAPClusterContrastProxyConfig.for_dataset("synthetic", **setting)
    CAPClusterContrastProxyConfig(cluster_weight=1.0, **setting)


def test_published_settings_of_both_parents():
    config, parent = CAPClusterContrastConfig(), ClusterContrastConfig()
    shared = parent.to_dict()
    assert {name: getattr(config, name) for name in shared} == shared
    assert (config.proxy_temp, config.proxy_momentum, config.hard_negatives) == (0.07, 0.2, 50)
    assert (config.inter_weight, config.inter_start) == (0.5, 5)
    proxy = CAPClusterContrastProxyConfig()
    assert (proxy.cluster_weight, proxy.intra_weight) == (0.0, 1.0)
    assert CAPClusterContrastConfig.for_dataset("market1501").iters == 200


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"proxy_temp": 0.0}, "proxy_temp must be positive"),
        ({"proxy_momentum": -0.1}, "proxy_momentum must lie in"),
        ({"hard_negatives": 0}, "hard_negatives must be at least 1"),
        ({"inter_weight": -1.0}, "inter_weight must be 0 or more"),
        ({"cluster_weight": 0.0}, "cluster_weight must be positive where intra_weight is 0"),
    ],
)
def test_settings_out_of_range_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        CAPClusterContrastConfig(**wrong)


@pytest.mark.parametrize("reading", READINGS)
def test_two_epochs(reading, tiny_world, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    run = fastreid_u.train(dataset, logs_dir=tmp_path / "run", method=reading.name, inter_start=1, **SMALL)
    assert [record["epoch"] for record in run.records] == [0, 1]
    assert all(record["loss"] > 0 and record["clusters"] > 1 for record in run.records)

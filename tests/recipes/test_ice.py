# SPDX-License-Identifier: Apache-2.0
"""ICE through its recipe: the published code's numbers, teacher and shuffled BatchNorm, odd data, two epochs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.engine.optimizer import learning_rate
from fastreid_u.models import build_model
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.ice import ICE, ICEConfig

SMALL = dict(
    method="ice", height=64, width=32, arch="resnet10", weights=None, bn_group=4, batch_size=16, num_instances=4,
    iters=3, epochs=2, workers=0, k1=8, k2=3, eps=0.5, center_per_camera=True, calibrate_bn=2, alpha=0.9, quiet=True,
    device="cpu",
)  # fmt: skip


def recipe(camids, count=None, **settings):
    camids = None if camids is None else torch.as_tensor(camids).long()
    return ICE(ICEConfig(**settings), Images(len(camids) if camids is not None else count, camids))


def built(camids, width=8, count=None, **settings):
    """A recipe whose network is not looked at."""
    made = recipe(camids, count, **settings)
    network = nn.Identity()
    network.num_features = width
    made.build(network)
    return made


def from_golden(golden, name, **settings):
    """A recipe that has begun an epoch on the published prototypes and centres, and the batch that was recorded."""
    stored = golden(name)
    labels, camids = stored.tensor("all_pseudo_labels"), stored.tensor("all_cams")
    pairs = list(zip(camids.tolist(), labels.tolist(), strict=True))
    row = {pair: i for i, pair in enumerate(sorted({pair for pair in pairs if pair[1] >= 0}))}
    prototypes = torch.cat([stored.tensor(f"prototypes_cam{camid}") for camid in range(stored.meta["params"]["cams"])])
    ice = built(camids, prototypes.shape[1], **settings)
    ice.begin_epoch(prototypes[[row.get(pair, 0) for pair in pairs]], labels, 0)
    ice.centres = stored.tensor("centers")
    batch = Batch((), torch.arange(len(stored["targets"])), stored.tensor("targets"), stored.tensor("cams_batch"))
    return stored, ice, batch


def loss_and_gradient(ice, stored, batch):
    x = stored.tensor("inputs").requires_grad_()
    loss = ice.loss((x, stored.tensor("ema_inputs_view2"), stored.tensor("ema_inputs_weak")), batch)
    loss.backward()
    return loss.detach(), x.grad


NONE = {"hard_weight": 0.0, "soft_weight": 0.0, "camera_weight": 0.0}
TERMS = {"vcl": {"hard_weight": 1.0}, "kl": {"soft_weight": 10.0}, "cam": {"camera_weight": 0.5}}


@pytest.mark.parametrize("name", ["ice_losses_many_proxies", "ice_losses_few_proxies"])
def test_losses_and_gradients_of_the_published_code(golden, name):
    stored, ice, batch = from_golden(golden, name, compat=True)
    loss, gradient = loss_and_gradient(ice, stored, batch)
    theirs = sum(stored.tensor(f"loss_{term}") for term in ("ccl", "cam", "vcl", "kl"))
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, stored.tensor("grad_total"), rtol=1e-4, atol=2e-6)

    _, ice, _ = from_golden(golden, name, compat=True, **NONE)
    clusters = loss_and_gradient(ice, stored, batch)
    torch.testing.assert_close(clusters[0], stored.tensor("loss_ccl"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clusters[1], stored.tensor("grad_ccl"), rtol=1e-4, atol=2e-6)
    for term, weight in TERMS.items():
        _, ice, _ = from_golden(golden, name, compat=True, **(NONE | weight))
        loss, gradient = loss_and_gradient(ice, stored, batch)
        torch.testing.assert_close(loss - clusters[0], stored.tensor(f"loss_{term}"), rtol=1e-5, atol=4e-6)
        torch.testing.assert_close(gradient - clusters[1], stored.tensor(f"grad_{term}"), rtol=1e-4, atol=4e-6)


def test_proxies_are_scaled_each_by_itself(golden):
    stored, ice, batch = from_golden(golden, "ice_losses_many_proxies", **(NONE | {"camera_weight": 0.5}))
    torch.testing.assert_close(ice.proxies.features.norm(dim=1), torch.ones(126))
    loss, _ = loss_and_gradient(ice, stored, batch)
    theirs = stored.meta["params"]["loss_cam_if_each_prototype_were_normalised"]
    assert (loss - stored.tensor("loss_ccl")).item() == pytest.approx(theirs, rel=1e-5)


def test_centres_are_means_and_nothing_moves_them():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(40, 8, generator=generator))
    labels, camids = torch.arange(40) % 5 - 1, torch.arange(40) // 20
    ice = built(camids)
    ice.begin_epoch(features, labels, 0)
    for cluster in range(4):
        torch.testing.assert_close(ice.centres[cluster], features[labels == cluster].mean(0))
    before = ice.centres.clone(), ice.proxies.features.clone()
    kept = labels >= 0
    ice.update((features[kept],) * 3, Batch((), kept.nonzero().flatten(), labels[kept], camids[kept]))
    assert torch.equal(ice.centres, before[0])
    assert torch.equal(ice.proxies.features, before[1])


def small_network(bn_group=4):
    return build_model("resnet10", pooling="avg", weights=None, bn_group=bn_group, seed=0)


def three_views(count=16, number=0):
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randn(count, 3, 32, 16, generator=generator) for _ in range(3))


def test_teacher_sees_other_groups_than_the_student_and_rows_return_to_their_place():
    views = three_views()
    views = (views[0],) * 3
    ice = recipe(torch.zeros(16))
    ice.build(small_network())
    ice.train()
    ice.begin_epoch(F.normalize(torch.randn(16, ice.model.num_features)), torch.arange(16) // 4, 0)
    order = torch.from_numpy(np.random.default_rng((1, 0, 2)).permutation(16))
    student, second, weak = ice.forward(Batch(views, torch.arange(16), torch.zeros(16)))
    assert student.requires_grad
    assert not second.requires_grad
    assert student.norm(dim=1).min() > 2  # not of unit length
    torch.testing.assert_close(second, weak)  # one order for both views
    assert (student - second).abs().max() > 0.1  # other groups, other statistics
    whole = recipe(torch.zeros(16))
    whole.build(small_network(None))
    whole.train()
    whole.begin_epoch(F.normalize(torch.randn(16, whole.model.num_features)), torch.arange(16) // 4, 0)
    student, second, _ = whole.forward(Batch(views, torch.arange(16), torch.zeros(16)))
    torch.testing.assert_close(student, second, rtol=1e-4, atol=1e-4)  # without groups the order does not matter
    assert not torch.equal(order, torch.arange(16))


def test_the_teacher_follows_slowly_and_keeps_its_own_statistics():
    ice = recipe(torch.zeros(16), alpha=0.75)
    ice.build(small_network())
    assert all(not p.requires_grad for p in ice.teacher.parameters())
    assert {id(p) for p in ice.parameters() if p.requires_grad} == {
        id(p) for p in ice.model.parameters() if p.requires_grad
    }
    assert list(ice.ranked()) == ["teacher"]
    before = ice.teacher.backbone.conv1.weight.clone()
    with torch.no_grad():
        ice.model.backbone.conv1.weight.add_(1.0)
        ice.model.bnneck.running_mean.add_(1.0)
    ice.update((), None)
    torch.testing.assert_close(ice.teacher.backbone.conv1.weight, before + 0.25)
    assert not ice.teacher.bnneck.running_mean.any()


@pytest.mark.parametrize(("compat", "looks"), [(False, 2), (True, 3)])
def test_published_teacher_looks_once_more(compat, looks):
    ice = recipe(torch.zeros(16), compat=compat)
    ice.build(small_network())
    ice.train()
    ice.begin_epoch(F.normalize(torch.randn(16, ice.model.num_features)), torch.arange(16) // 4, 0)
    ice.forward(Batch(three_views(), torch.arange(16), torch.zeros(16)))
    assert ice.teacher.bnneck.num_batches_tracked == looks
    assert ice.model.bnneck.num_batches_tracked == 1


def test_teacher_is_clustered():
    ice = recipe(torch.zeros(4))
    ice.build(small_network())
    asked = []
    ice.features(lambda network: asked.append(network), 0)
    assert asked == [ice.teacher]


def test_groups_hold_many_cameras():
    labels, camids = torch.arange(8).repeat_interleave(20), torch.arange(160) % 4
    stream = np.array(recipe(camids, iters=10).batches(labels, 0)).reshape(-1, 4)
    assert all(len({camids[i].item() for i in group}) == 4 for group in stream)
    without = np.array(recipe(camids, iters=10, no_cam=True).batches(labels, 0)).reshape(-1, 4)
    assert any(len({camids[i].item() for i in group}) < 4 for group in without)


def test_agnostic_ice_needs_no_cameras():
    with pytest.raises(ValueError, match="method 'ice' needs images of two cameras or more, or camera_weight=0"):
        recipe(None, 40)
    ice = built(None, count=40, camera_weight=0.0)
    features, labels = F.normalize(torch.randn(40, 8)), torch.arange(40) % 10
    ice.begin_epoch(features, labels, 0)
    rows = torch.tensor(ice.batches(labels, 0)[0])
    assert len(labels[rows].unique()) == 8
    x = features[rows].requires_grad_()
    ice.loss((x, features[rows], features[rows]), Batch((), rows, labels[rows])).backward()
    assert torch.isfinite(x.grad).all()


def test_camera_numbers_clusters_of_one_image_and_unequal_groups():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(11, 8, generator=generator))
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])  # no two clusters need be equally often in a batch
    losses = []
    for camids in ([0, 1, 2] * 3 + [0, 1], [5, 70, 900] * 3 + [5, 70]):
        ice = built(camids)
        ice.begin_epoch(features, labels, 0)
        batch = Batch((), torch.arange(11), labels, torch.tensor(camids))
        losses.append(ice.loss((4 * features, features, features), batch))
    assert torch.equal(*losses)
    assert torch.isfinite(losses[0])
    with pytest.warns(RuntimeWarning, match="too few clusters to fill a batch of 32"):
        batches = ice.batches(labels, 0)
    assert [len(batch) for batch in batches] == 400 * [32]


def test_published_defaults():
    config = ICEConfig()
    assert (config.eps, config.k1, config.min_samples, config.alpha) == (0.55, 30, 4, 0.999)
    assert (config.temp, config.hard_temp, config.soft_temp, config.camera_temp) == (0.5, 0.1, 0.4, 0.07)
    assert (config.hard_weight, config.soft_weight, config.camera_weight, config.smoothing) == (1, 10, 0.5, 0.1)
    assert (config.batch_size, config.num_instances, config.bn_group, config.epochs, config.iters) == (
        32,
        4,
        8,
        40,
        400,
    )
    rates = [learning_rate(config, epoch) / 3.5e-4 for epoch in (0, 5, 10, 39)]
    assert rates == pytest.approx([0.1, 0.55, 1, 1])
    first, second, weak = recipe([0, 1]).views()
    assert first == second
    assert [type(step).__name__ for step in first.steps] == ["Flip", "PadCrop", "Blur", "Normalize", "Erase"]
    assert (first.steps[-1].p, first.steps[2].p) == (0.6, 0.5)
    assert [type(step).__name__ for step in weak.steps] == ["Normalize"]


@pytest.mark.parametrize(
    "wrong", [{"temp": 0.0}, {"hard_temp": -1.0}, {"soft_weight": -1.0}, {"alpha": 1.1}, {"blur": 2.0},
              {"smoothing": -0.1}, {"hard_negatives": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"config: {next(iter(wrong))} must"):
        ICEConfig(**wrong)


def test_two_epochs(tiny_world, tmp_path):
    run = fastreid_u.train(load_dataset("market1501", tiny_world), logs_dir=tmp_path / "run", **SMALL)
    assert [record["epoch"] for record in run.records] == [0, 1]
    assert all(record["loss"] > 0 and record["clusters"] > 1 for record in run.records)
    state, saved = (load_file(run.folder / f"{name}.safetensors") for name in ("state", "model_last"))
    weight = "backbone.conv1.weight"
    assert torch.equal(saved[weight], state[f"recipe.teacher.{weight}"])
    assert not torch.equal(saved[weight], state[f"recipe.model.{weight}"])

    dataset, folder = load_dataset("market1501", tiny_world), tmp_path / "resumed"
    for epochs in (1, 2):
        fastreid_u.train(dataset, logs_dir=folder, resume=epochs == 2, **{**SMALL, "epochs": epochs})
    resumed = load_file(folder / "state.safetensors")
    assert all(torch.equal(resumed[name], state[name]) for name in state)

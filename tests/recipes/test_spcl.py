# SPDX-License-Identifier: Apache-2.0
"""SpCL: published numbers through the recipe's own objects, the published step restated, and what can go wrong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.labels import dbscan
from fastreid_u.models.reid import ReIDModel
from fastreid_u.ops.label_classes import own_classes
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes import get_method
from fastreid_u.recipes.spcl import SpCL, SpCLConfig

HYBRID = ["plain", "repeated_indices", "unnormalised", "unused_labels"]
CRITERION = ["n150_eps0.6_gap0.1", "n320_eps0.6_gap0.02", "n500_eps0.55_gap0.06"]


def network(width=16, inputs=12):
    """A network whose images are (B, ``inputs``) rows."""
    torch.manual_seed(0)
    backbone = nn.Linear(inputs, width)
    backbone.num_features = width
    return ReIDModel(backbone, nn.Identity(), arch="linear")


def recipe_with_memory(features, camids=None, **settings):
    recipe = SpCL(SpCLConfig(**settings), Images(len(features), camids))
    recipe.build(network(features.shape[1]))
    recipe.images.readable = torch.isfinite(features).all(dim=1)
    recipe.features(lambda _: features, epoch=0)
    return recipe


def batch(indices, views=()):
    return Batch(views=views, indices=indices, targets=torch.zeros_like(indices))


def published_step(memory, labels, x, rows, temp, momentum):
    """Loss, then what backward does to the gradient and the memory: all B x N similarities, one sample at a time."""
    similarity = x @ memory.T / temp
    count = torch.bincount(labels[labels >= 0]).float()
    sums = torch.zeros(len(x), len(count)).index_add(1, labels[labels >= 0], similarity[:, labels >= 0])
    weight = torch.exp(sums / count.clamp(min=1)) * (count > 0)
    p = weight / (weight.sum(dim=1, keepdim=True) + 1e-6)
    loss = -torch.log(p.gather(1, labels[rows][:, None]) + 1e-6).mean()
    after = memory.clone()
    for feature, row in zip(x.detach(), rows.tolist(), strict=True):
        after[row] = F.normalize(momentum * after[row] + (1 - momentum) * feature, dim=0)
    return loss, after


@pytest.mark.parametrize("kind", HYBRID)
def test_loss_gradient_and_memory_are_the_published_ones(golden, kind):
    file = golden(f"hybrid_{kind}_n300_b48_d64")
    rows = file.tensor("indexes")
    for temp, momentum in file.meta["params"]["temp_momentum"]:
        case = f"t{temp}_m{momentum}"
        recipe = recipe_with_memory(file.tensor("features_before"), temp=temp, momentum=momentum)
        recipe.begin_epoch(recipe.memory.features, file.tensor("labels"), epoch=0)
        x = file.tensor("inputs").requires_grad_()
        loss = recipe.loss(x, batch(rows))
        loss.backward()
        recipe.update(x.detach(), batch(rows))
        np.testing.assert_allclose(loss.item(), file[f"loss_{case}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x.grad.numpy(), file[f"grad_{case}"], rtol=1e-4, atol=2e-6)
        moved = file.tensor("rows")
        after = recipe.memory.features.numpy()
        np.testing.assert_allclose(after[moved], file[f"features_after_rows_{case}"], rtol=0, atol=1e-6)
        untouched = np.setdiff1d(np.arange(300), moved)
        np.testing.assert_array_equal(after[untouched], file["features_before"][untouched])


def test_published_trajectory(golden):
    file = golden("hybrid_trajectory_n200_b32_d48")
    recipe = recipe_with_memory(file.tensor("features_before"))
    recipe.begin_epoch(recipe.memory.features, file.tensor("labels"), epoch=0)
    for step, (inputs, rows) in enumerate(zip(file.tensor("inputs"), file.tensor("indexes"), strict=True)):
        x = inputs.clone().requires_grad_()
        loss = recipe.loss(x, batch(rows))
        loss.backward()
        recipe.update(x.detach(), batch(rows))
        assert loss.item() == pytest.approx(file["loss"][step], rel=1e-5, abs=1e-6)
        if step in (0, 4, 9):
            expected = file[f"features_after_step{step + 1}"]
            np.testing.assert_allclose(recipe.memory.features.numpy(), expected, rtol=0, atol=5e-6)
    np.testing.assert_allclose(x.grad.numpy(), file["grad_last"], rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("name", CRITERION)
def test_clusters_are_chosen_as_published_and_the_bar_stays(golden, name, monkeypatch):
    file = golden(f"spcl_criterion_{name}")
    params = file.meta["params"]
    settings = dict(eps=params["eps"], eps_gap=params["eps_gap"], k1=params["k1"], k2=params["k2"])
    recipe = SpCL(SpCLConfig(**settings), Images(params["N"]))
    for epoch in (0, 1):
        stored = torch.stack([file.tensor(f"dbscan_{kind}_epoch{epoch}") for kind in ("normal", "tight", "loose")])

        def clusterings(features, *, eps, stored=stored, **rest):
            assert eps == [params["eps"], params["eps"] - params["eps_gap"], params["eps"] + params["eps_gap"]]
            assert rest.pop("knn")[1].shape == (params["N"], params["k1"])
            assert rest == {"min_samples": 4, "k1": params["k1"], "k2": params["k2"], "group": None}
            return stored

        monkeypatch.setattr(dbscan, "pseudo_labels", clusterings)
        labels = recipe.labels(torch.zeros(params["N"], 2), epoch)
        classes = own_classes(labels)
        expected = file.tensor(f"final_labels_epoch{epoch}")
        together = torch.stack([classes, expected]).unique(dim=1)
        assert together.shape[1] == len(classes.unique()) == len(expected.unique())  # the same partition
        assert 1 - recipe.labels.threshold == pytest.approx(float(file[f"indep_threshold_epoch{epoch}"]), abs=1e-6)
        state = recipe.state_dict()  # as a resumed run has it
        recipe = SpCL(recipe.config, recipe.images)
        recipe.load_state_dict(state)


def test_twenty_steps_of_the_published_algorithm(clustered):
    """Two epochs of ten steps with network, Adam and memory, against the step as published, restated plainly."""
    images = clustered(120, 12, number=3, spread=1.0)
    config = dict(k1=10, k2=4, eps=0.5, eps_gap=0.1, batch_size=16)
    model, recipe = network(), SpCL(SpCLConfig(**config), Images(120))
    recipe.build(network())
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, weight_decay=5e-4) for m in (recipe.model, model)]

    def extract(net, of="target"):
        with torch.inference_mode():
            return net.eval()(images)

    memory = extract(model).clone()
    for epoch in (0, 1):
        features = recipe.features(extract, epoch)
        torch.testing.assert_close(features, memory, atol=1e-5, rtol=0)
        labels = recipe.labels(features, epoch)
        assert 1 < labels.max() < 20
        assert (labels < 0).any()
        classes = recipe.begin_epoch(features, labels, epoch)
        recipe.model.train(), model.train()
        for rows in torch.tensor(recipe.batches(classes, epoch)[:10]):
            x = recipe.forward(batch(rows, (images[rows],)))
            loss = recipe.loss(x, batch(rows))
            loss.backward()
            recipe.update(x.detach(), batch(rows))
            expected, memory = published_step(memory, classes, model(images[rows]), rows, 0.05, 0.2)
            expected.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
            torch.testing.assert_close(recipe.memory.features, memory, atol=1e-5, rtol=0)


def test_unclustered_images_are_classes_of_one_and_shown_once():
    recipe = recipe_with_memory(F.normalize(torch.randn(9, 4)), batch_size=4, num_instances=4, iters=0)
    labels = torch.tensor([0, 0, 0, 0, -1, 1, -1, 1, -1])
    targets = recipe.begin_epoch(recipe.memory.features, labels, epoch=0)
    assert targets.tolist() == [0, 0, 0, 0, 2, 1, 3, 1, 4]
    shown = recipe.batches(targets, epoch=0)
    assert [len(batch) for batch in shown] == [4, 4]  # 4 + 4 + 1 + 1 + 1, without the last batch that is not full
    once = recipe_with_memory(F.normalize(torch.randn(9, 4)), batch_size=5, num_instances=1, iters=0)
    assert sorted({row for rows in once.batches(targets, epoch=0) for row in rows} & {4, 6, 8}) == [4, 6, 8]


def test_small_and_few_clusters_fill_a_batch_by_repetition():
    features = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    recipe = recipe_with_memory(features, batch_size=16, num_instances=4, iters=2)
    targets = recipe.begin_epoch(features, torch.tensor([0, 0, 1, 1, -1, -1]), epoch=0)
    with pytest.warns(RuntimeWarning, match="too few clusters to fill a batch of 16"):
        shown = recipe.batches(targets, epoch=0)
    assert [len(batch) for batch in shown] == [16, 16]
    assert {*shown[0], *shown[1]} == set(range(6))


@pytest.mark.filterwarnings("ignore:.* is more than the 5 rows there are:UserWarning")
def test_images_that_cannot_be_read_are_in_no_class():
    features = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    features[2] = torch.nan
    recipe = recipe_with_memory(features)
    again = recipe.features(None, epoch=1)
    assert torch.equal(again.any(dim=1), torch.arange(6) != 2)
    assert recipe.labels(again, epoch=1)[2] == -1
    labels = torch.tensor([0, 0, -1, -1, 0, 0])
    assert recipe.begin_epoch(again, labels, epoch=1).tolist() == [0, 0, -1, 1, 0, 0]
    rows = torch.tensor([0, 3])
    assert torch.isfinite(recipe.loss(features[rows], batch(rows)))


def test_rows_are_extracted_once_or_in_every_epoch():
    first, later = (F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(n))) for n in (0, 1))
    for refresh, expected in ((False, first), (True, later)):
        recipe = recipe_with_memory(first, refresh=refresh)
        assert torch.equal(recipe.features(lambda _: later, epoch=1), expected)
        assert torch.equal(recipe.memory.features, expected)


def test_no_cluster_in_the_first_epoch_leaves_the_bar_to_the_next():
    recipe = SpCL(SpCLConfig(k1=8, k2=1), Images(40))
    scattered = F.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    assert (recipe.labels(scattered, epoch=0) == -1).all()
    assert recipe.labels.threshold is None
    recipe.load_state_dict(recipe.state_dict())
    assert recipe.labels.threshold is None
    tight = scattered[torch.arange(40) % 5]
    assert len(recipe.labels(tight, epoch=1).unique()) == 5
    assert recipe.labels.threshold == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps_gap": 0.4}, r"eps_gap must keep eps -\+ eps_gap within \(0, 1\), got 0.4"),
        ({"eps_gap": -0.1}, "eps_gap must keep"),
        ({"keep": 1.5}, r"keep must lie in \[0, 1\], got 1.5"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\], got -0.1"),
        ({"temp": 0.0}, "temp must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SpCLConfig(**wrong)


def test_defaults_are_the_published_ones():
    config = SpCLConfig.for_dataset("market1501")
    assert (config.batch_size, config.num_instances, config.bn_group, config.iters) == (64, 4, 16, 400)
    assert (config.temp, config.momentum, config.eps, config.eps_gap, config.keep) == (0.05, 0.2, 0.6, 0.02, 0.9)
    assert (config.lr, config.weight_decay, config.epochs, config.step_size) == (3.5e-4, 5e-4, 50, 20)
    assert config.pooling_type == "avg"
    assert {SpCLConfig.for_dataset(name).iters for name in ("msmt17", "veri", "vehicleid", "vehiclex")} == {800}
    assert get_method("spcl") is SpCL
    assert (
        SpCL(config, Images(4))
        .labels.describe()
        .endswith("eps 0.6, min_samples 4, clusters that eps -+ 0.02 agree with")
    )


SMALL = dict(
    method="spcl", height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, iters=3,
    epochs=2, workers=0, k1=8, k2=3, eps_gap=0.1, center_per_camera=True, calibrate_bn=2, eval_step=2, quiet=True,
    device="cpu",
)  # fmt: skip


def test_two_epochs_and_a_crash_between_them(tiny_world, tmp_path, power_cut):
    """Memory and bar survive: the resumed run ends where the unbroken one does."""
    dataset = load_dataset("market1501", tiny_world)
    whole = fastreid_u.train(dataset, logs_dir=tmp_path / "whole", **SMALL)
    assert len(whole.records) == 2
    assert all(np.isfinite(record["loss"]) and record["clusters"] > 1 for record in whole.records)

    with power_cut(1):
        fastreid_u.train(dataset, logs_dir=tmp_path / "broken", **SMALL)
    resumed = fastreid_u.train(dataset, logs_dir=tmp_path / "broken", resume=True, **SMALL)
    ours, theirs = (load_file(run.folder / "state.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys() >= {"recipe.memory.features", "recipe.labels.bar"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    saved = load_file(resumed.folder / "model_last.safetensors")
    assert not any("memory" in name for name in saved)  # the network alone

# SPDX-License-Identifier: Apache-2.0
"""CACL: published numbers through the recipe's own objects, its two views and networks, and what can go wrong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.data.transforms import Grey, Normalize
from fastreid_u.labels import dbscan, refined
from fastreid_u.models import build_model
from fastreid_u.models.reid import ReIDModel
from fastreid_u.ops.label_classes import own_classes
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes import get_method
from fastreid_u.recipes.cacl import CACL, CACLConfig, SeesGrey, Step


def network(width):
    backbone = nn.Linear(12, width)
    backbone.num_features = width
    return ReIDModel(backbone, nn.Identity(), arch="linear")


def unit(*shape, number):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(number)), dim=-1)


def recipe_with_memories(features, labels, **settings):
    recipe = CACL(CACLConfig(**settings), Images(len(features)))
    recipe.build(network(features.shape[1]))
    recipe.images.readable = torch.isfinite(features).all(dim=1)
    recipe.features(lambda _: features, epoch=0)
    recipe.begin_epoch(features, labels, epoch=0)
    return recipe


@pytest.mark.parametrize(("temp", "momentum"), [(0.05, 0.2), (0.1, 0.1)])
def test_loss_gradients_and_memories_are_the_published_ones(golden, temp, momentum):
    """Stored with back=0: one branch's own term; with back=1: that and both terms that bind the other branch to it."""
    file = golden("cacl_memory_n240_b40_d64")
    labels, rows = file.tensor("labels"), file.tensor("indexes")
    recipe = recipe_with_memories(file.tensor("features_before"), labels, temp=temp, momentum=momentum)
    seen, other = (file.tensor(name) for name in ("inputs", "another_inputs"))
    x = Step(*(rows.clone().requires_grad_() for rows in (seen, other, seen)))
    batch = Batch(views=(), indices=rows, targets=recipe.begin_epoch(recipe.memory.features, labels, epoch=0)[rows])
    loss = recipe.loss(x, batch)
    loss.backward()
    recipe.update(Step(*(rows.detach() for rows in x)), batch)
    own, both = (f"back{back}_t{temp}_m{momentum}" for back in (0, 1))
    np.testing.assert_allclose(loss.item(), file[f"loss_{own}"] + file[f"loss_{both}"], rtol=1e-5, atol=1e-6)
    for gradient, stored in (
        (x.colour.grad, f"grad_inputs_{own}"),
        (x.grey.grad, f"grad_inputs_{both}"),  # nothing flows to the grey branch from what binds the colour one to it
        (x.predicted.grad, f"grad_another_{both}"),
    ):
        np.testing.assert_allclose(gradient.numpy(), file[stored], rtol=1e-4, atol=2e-6)
    for name in ("memory", "grey_memory"):
        after = getattr(recipe, name).features[file.tensor("rows")].numpy()
        np.testing.assert_allclose(after, file[f"features_after_rows_{own}"], rtol=0, atol=1e-6)


def test_the_two_terms_between_the_branches_are_the_published_ones(golden):
    file = golden("cacl_memory_n240_b40_d64")
    labels, rows = file.tensor("labels"), file.tensor("indexes")
    batch = Batch(views=(), indices=rows, targets=labels[rows])
    seen, other = (file.tensor(name) for name in ("inputs", "another_inputs"))

    def between(pair, cluster):
        recipe = recipe_with_memories(file.tensor("features_before"), labels, pair_weight=pair, cluster_weight=cluster)
        predicted = other.clone().requires_grad_()
        loss = recipe.loss(Step(seen, predicted, seen), batch)
        loss.backward()
        return loss.item(), predicted.grad.numpy()

    base, _ = between(0.0, 0.0)
    for weights, name in (((1.0, 0.0), "contrastive_pair"), ((0.0, 1.0), "contrastive_centre")):
        loss, gradient = between(*weights)
        assert loss - base == pytest.approx(float(file[f"loss_{name}"]), abs=2e-5)
        np.testing.assert_allclose(gradient, file[f"grad_{name}"], rtol=1e-4, atol=2e-6)


def test_each_branch_has_its_own_memory_and_goals():
    """The stored step shows the same rows to both; here colour, grey and both memories differ."""
    labels, indices = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 3, 3, 5])
    images, greys = unit(6, 8, number=1), unit(6, 8, number=2)
    recipe = recipe_with_memories(images, labels, temp=0.2, momentum=0.3, focal_gamma=2.0)
    recipe.grey_memory.features.copy_(greys)
    recipe.begin_epoch(images, labels, epoch=0)
    x = Step(*(unit(4, 8, number=n).requires_grad_() for n in (3, 4, 5)))
    batch = Batch(views=(), indices=indices, targets=labels[indices])
    loss = recipe.loss(x, batch)
    loss.backward()

    def own(features, memory):
        means = torch.stack([memory[labels == c].mean(dim=0) for c in range(3)])
        p = (features @ means.T / 0.2).softmax(dim=1).gather(1, labels[indices][:, None])
        return -((1 - p) ** 2 * (p + 1e-6).log()).mean(), F.normalize(means[labels[indices]])

    y = Step(*(rows.detach().requires_grad_() for rows in x))
    colour, _ = own(y.colour, images)
    grey, goals = own(y.grey, greys)
    expected = colour + grey - (y.predicted * (y.grey.detach() + goals)).sum(dim=1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(x.colour.grad, y.colour.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(x.grey.grad, y.grey.grad, atol=1e-5, rtol=1e-4)

    recipe.update(Step(*(rows.detach() for rows in x)), batch)
    for name, memory, features in (("memory", images, x.colour), ("grey_memory", greys, x.grey)):
        after = memory.clone()
        for row, feature in zip(indices.tolist(), features.detach(), strict=True):
            after[row] = F.normalize(0.3 * after[row] + 0.7 * feature, dim=0)
        torch.testing.assert_close(getattr(recipe, name).features, after)


@pytest.mark.parametrize("name", ["n260_eps0.6_gap0.02", "n330_eps0.6_gap0.1"])
def test_refinement_is_the_published_one(golden, name, monkeypatch):
    file = golden(f"cacl_refinement_{name}")
    params = file.meta["params"]
    count, eps, gap = params["N"], params["eps"], params["eps_gap"]
    stored = torch.stack([file.tensor("dbscan_normal"), file.tensor("dbscan_tight")])
    distances = torch.from_numpy(file.matrix("dist"))
    refine = refined.refine_clusters

    def clusterings(features, *, eps, **rest):
        assert eps == [params["eps"], params["eps"] - params["eps_gap"]]
        return stored

    def on_stored_distances(x, labels, tight, *, k1, k2, knn, **settings):
        return refine(None, labels, tight, graph=distances, **settings)

    monkeypatch.setattr(dbscan, "pseudo_labels", clusterings)
    monkeypatch.setattr(refined, "refine_clusters", on_stored_distances)
    recipe = CACL(CACLConfig(eps=eps, eps_gap=gap), Images(count))
    labels = recipe.labels(torch.randn(count, 4), epoch=0)
    classes = own_classes(labels)
    expected = file.tensor("final_labels")
    together = torch.stack([classes, expected]).unique(dim=1)
    assert together.shape[1] == len(classes.unique()) == len(expected.unique())  # the same partition
    assert len(labels.unique()) - 1 == params["final_clusters"]
    assert (labels < 0).sum() == params["final_singletons"]


def split_cluster():
    """16 images close together, 4 stragglers between them and nothing: one cluster that the tighter radius splits."""
    generator = torch.Generator().manual_seed(3)
    core, lost = F.normalize(torch.randn(2, 16, generator=generator))
    noise = 0.05 * torch.randn(20, 16, generator=generator)
    return F.normalize(torch.cat([core.expand(16, -1), (0.75 * core + 0.6 * lost).expand(4, -1)]) + noise)


def test_refinements_differ_as_said(monkeypatch):
    labels = torch.stack([torch.zeros(20, dtype=torch.int64), torch.tensor([0] * 16 + [1] * 4)])
    monkeypatch.setattr(dbscan, "pseudo_labels", lambda *_, **__: labels)
    kept = {}
    for rule in ("official", "mean_to_cluster", "none"):
        recipe = CACL(CACLConfig(refinement=rule, k1=12, k2=3), Images(20))
        kept[rule] = (recipe.labels(split_cluster(), 0) >= 0).tolist()
    assert kept["none"] == [True] * 20
    assert kept["official"] == [False] * 16 + [True] * 4  # the core dissolves, the stragglers stay
    assert kept["mean_to_cluster"] == [True] * 16 + [False] * 4


def test_refinement_measures_what_the_clustering_measured(clustered):
    """From features on, as in a run: the label step equals the ops put together by hand."""
    features = clustered(150, 24, number=5)
    recipe = CACL(CACLConfig(k1=12, k2=4, eps=0.6, eps_gap=0.15), Images(150))
    found = recipe.labels(features, epoch=0)
    labels, tight = fastreid_u.pseudo_labels(features, eps=[0.6, 0.6 - 0.15], k1=12, k2=4)
    graph = fastreid_u.jaccard_distance(features, k1=12, k2=4)
    expected = refined.refine_clusters(None, labels, tight, graph=graph, singletons=False)
    assert torch.equal(found, expected)
    assert (found != labels).any()


def test_the_second_view_is_grey_and_drawn_apart():
    recipe = CACL(CACLConfig(height=32, width=16, color_jitter=0.0), Images(4))
    colour, grey = recipe.views()
    image = torch.randint(0, 256, (3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shown = [view(image, np.random.default_rng(4)) for view in (colour, grey)]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    levels = [view * std + mean for view in shown]
    assert (levels[0][0] - levels[0][1]).abs().max() > 0.1
    without = CACL(CACLConfig(height=32, width=16, grey=False), Images(4)).views()
    assert without[0] == without[1] == colour
    assert (levels[1] - levels[1][:1]).abs().max() < 0.5  # all but an erased patch, whose fill has a colour
    assert ((levels[1] - levels[1][:1]).abs().amax(dim=0) < 1e-5).float().mean() > 0.5


def test_the_grey_memory_starts_from_grey_images_or_as_published(seed):
    """What the grey network is asked about is the grey view without its random steps, up to its rounding."""
    recipe = CACL(CACLConfig(height=32, width=16), Images(4))
    normalize = next(step for step in recipe.views()[1].steps if isinstance(step, Normalize))
    pixels = torch.randint(0, 256, (4, 3, 32, 16), dtype=torch.uint8, generator=seed())
    rng = np.random.default_rng(0)
    colour, grey = (
        torch.stack([normalize(change(image), rng) for image in pixels])
        for change in (lambda image: image, lambda image: Grey()(image, rng))
    )
    shown = SeesGrey(nn.Identity(), normalize)(colour)
    assert (shown - grey).abs().max() < 0.5 / 255 / 0.224 + 1e-5

    for settings in ({}, {"compat": True}, {"grey": False}):
        recipe = CACL(CACLConfig(**settings), Images(4))
        recipe.build(build_model("resnet10", pooling="avg", weights=None, seed=0))

        def extract(network):
            with torch.inference_mode():
                return network.eval()(colour)

        recipe.features(extract, epoch=0)
        same = torch.equal(recipe.memory.features, recipe.grey_memory.features)
        assert same is bool(settings)  # both networks start equal, so what differs is what they were shown


@pytest.mark.parametrize("refresh", [False, True])
def test_rows_are_extracted_once_or_in_every_epoch(refresh):
    recipe = CACL(CACLConfig(refresh=refresh), Images(4))
    recipe.build(network(8))
    for epoch in (0, 1):
        recipe.features(lambda _, number=epoch: unit(4, 8, number=number), epoch)
    for name in ("memory", "grey_memory"):
        assert torch.equal(getattr(recipe, name).features, unit(4, 8, number=int(refresh)))


def test_networks_share_no_weight_and_the_predictor_reads_the_pooled_feature():
    torch.manual_seed(0)
    recipe = CACL(CACLConfig(), Images(6))
    recipe.build(build_model("resnet10", pooling="avg", weights=None, seed=0))
    model, grey = recipe.model.state_dict(), recipe.grey.state_dict()
    assert all(torch.equal(model[name], grey[name]) for name in model)  # the same start
    assert not {p.data_ptr() for p in recipe.model.parameters()} & {p.data_ptr() for p in recipe.grey.parameters()}
    assert not recipe.predictor.norm.bias.requires_grad
    assert list(recipe.ranked()) == ["model"]

    recipe.train()
    views = torch.randn(2, 6, 3, 32, 16)
    batch = Batch(views=tuple(views), indices=torch.arange(6), targets=torch.tensor([0, 0, 0, 1, 1, 1]))
    x = recipe.forward(batch)
    for rows in (x.colour, x.grey):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    recipe.memory.features.copy_(x.colour.detach())
    recipe.grey_memory.features.copy_(x.grey.detach())
    recipe.begin_epoch(x.colour.detach(), batch.targets, epoch=0)
    recipe.loss(x, batch).backward()
    trained = [name for name, p in recipe.named_parameters() if p.requires_grad]
    assert all(dict(recipe.named_parameters())[name].grad is not None for name in trained)
    pooled = recipe.model.pool(recipe.model.feature_map(views[0]))
    torch.testing.assert_close(x.predicted, recipe.predictor(pooled))
    before = recipe.predictor.linear.weight.std().item()
    assert before == pytest.approx((2 / recipe.model.num_features) ** 0.5, rel=0.02)  # kaiming, fan out


@pytest.mark.filterwarnings("ignore:.* is more than the 6 rows there are:UserWarning")
def test_single_images_and_unreadable_ones():
    features = F.normalize(torch.randn(7, 8, generator=torch.Generator().manual_seed(0)))
    features[5] = torch.nan
    labels = torch.tensor([0, 0, 0, 0, -1, -1, -1])
    recipe = recipe_with_memories(features, labels)
    targets = recipe.begin_epoch(recipe.memory.features, labels, epoch=0)
    assert targets.tolist() == [0, 0, 0, 0, 1, -1, 2]
    assert recipe.features(None, epoch=1).any(dim=1).tolist() == [True] * 5 + [False, True]
    assert recipe.labels(recipe.memory.features, epoch=1)[5] == -1
    rows = torch.tensor([0, 4, 6])
    x = Step(*(features[rows] for _ in range(3)))
    assert torch.isfinite(recipe.loss(x, Batch(views=(), indices=rows, targets=targets[rows])))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"focal_gamma": 0.5}, "focal_gamma must be 0 or at least 1, got 0.5"),
        ({"eps_gap": 0.6}, "eps_gap must keep eps - eps_gap positive, got 0.6"),
        ({"ratio": 0.0}, "ratio must be positive, got 0.0"),
        ({"pair_weight": -1.0}, "pair_weight must be 0 or more, got -1.0"),
        ({"temp": 0.0}, "temp must be positive, got 0.0"),
        ({"momentum": 2.0}, r"momentum must lie in \[0, 1\], got 2.0"),
        ({"refinement": "paper"}, "refinement must be one of official, mean_to_cluster, none, got 'paper'"),
    ],
)
def test_settings_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        CACLConfig(**wrong)


def test_defaults_are_the_published_ones():
    config = CACLConfig.for_dataset("market1501")
    assert (config.batch_size, config.num_instances, config.iters, config.epochs) == (64, 4, 400, 80)
    assert (config.temp, config.momentum, config.eps, config.eps_gap) == (0.05, 0.2, 0.6, 0.02)
    assert (config.focal_gamma, config.refinement, config.ratio) == (4.0, "official", 1.0)
    assert (config.lr, config.weight_decay, config.step_size, config.seed) == (3.5e-4, 5e-4, 20, 111)
    assert (config.pooling_type, config.bn_group) == ("avg", None)
    assert get_method("cacl") is CACL
    assert CACL(config, Images(4)).labels.describe().endswith("min_samples 4, refined by eps 0.58 (official)")
    assert CACL(CACLConfig(refinement="none"), Images(4)).labels.describe().endswith("min_samples 4")


def test_two_epochs(tiny_world, tmp_path):
    run = fastreid_u.train(
        load_dataset("market1501", tiny_world), method="cacl", logs_dir=tmp_path / "run", height=64, width=32,
        arch="resnet10", weights=None, batch_size=16, iters=3, epochs=2, workers=0, k1=8, k2=3, eps_gap=0.1,
        center_per_camera=True, calibrate_bn=2, eval_step=2, quiet=True, device="cpu", amp="bf16",
    )  # fmt: skip
    assert all(np.isfinite(record["loss"]) and record["clusters"] > 1 for record in run.records)
    state = load_file(run.folder / "state.safetensors")
    colour, grey = (state[f"recipe.{name}.features"] for name in ("memory", "grey_memory"))
    assert not torch.equal(colour, grey)
    one, two = (state[f"recipe.{name}.backbone.conv1.weight"] for name in ("model", "grey"))
    assert not torch.equal(one, two)
    saved = load_file(run.folder / "model_last.safetensors")
    assert torch.equal(saved["backbone.conv1.weight"], one)  # the colour network alone
    assert not any("predictor" in name or "memory" in name for name in saved)

# SPDX-License-Identifier: Apache-2.0
"""Cluster Contrast through the recipe's own objects: published numbers, and twenty steps beside a plain restatement."""

import dataclasses
import importlib.util
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_u import _env
from fastreid_u.engine.loop import NoClustersError
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig
from fastreid_u.recipes.cluster_contrast_infomap import ClusterContrastInfomap, ClusterContrastInfomapConfig


def batch_of(indices, labels):
    return Batch(views=(), indices=indices, targets=labels[indices])


def network(dim=32):
    """Stands for a backbone: enough to have weights that move."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, dim))
    made.num_features = dim
    return made


@pytest.mark.parametrize("use_hard", [False, True])
def test_twenty_steps_equal_a_plain_restatement(use_hard):
    """The published step: softmax over the rows, gradient from the old rows, then every sample (or the hardest) in."""
    torch.manual_seed(1)
    images, labels = torch.randn(60, 12), torch.arange(60) % 6
    labels[::7] = -1
    clustered = torch.nonzero(labels >= 0).flatten()
    ours, theirs = network(), network()
    config = ClusterContrastConfig(use_hard=use_hard, momentum=0.1, temp=0.05)
    recipe = ClusterContrast(config, Images(60))
    recipe.build(ours)
    with torch.no_grad():
        features = F.normalize(ours(images), dim=1)
    recipe.begin_epoch(features, labels, epoch=0)
    memory = F.normalize(torch.stack([features[labels == c].mean(0) for c in range(6)]), dim=1)

    optimizers = [torch.optim.Adam(n.parameters(), lr=3.5e-4, weight_decay=5e-4) for n in (ours, theirs)]
    for step in range(20):
        drawn = clustered[torch.randperm(len(clustered), generator=torch.Generator().manual_seed(step))[:24]]
        batch = batch_of(drawn, labels)

        loss = recipe.loss(x := ours(images[drawn]), batch)
        optimizers[0].zero_grad()
        loss.backward()
        recipe.update(x.detach(), batch)
        optimizers[0].step()

        unit = F.normalize(theirs(images[drawn]), dim=1)
        plain = F.cross_entropy(unit @ memory.T / 0.05, batch.targets)
        optimizers[1].zero_grad()
        plain.backward()
        unit = unit.detach()
        if use_hard:
            for c in dict.fromkeys(batch.targets.tolist()):
                own = unit[batch.targets == c]
                memory[c] = 0.1 * memory[c] + 0.9 * own[(own @ memory[c]).argmin()]
                memory[c] /= memory[c].norm()
        else:
            for row, c in zip(unit, batch.targets.tolist(), strict=True):
                memory[c] = 0.1 * memory[c] + 0.9 * row
                memory[c] /= memory[c].norm()
        optimizers[1].step()

        assert loss.item() == pytest.approx(plain.item(), abs=1e-5), f"step {step}"
        torch.testing.assert_close(recipe.memory.features, memory, atol=1e-5, rtol=0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_hard", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.2, 0.9])
def test_the_recipe_repeats_a_stored_run_of_the_published_class(golden, momentum, use_hard):
    """Ten steps of loss, gradient and rows, as the published memory gave them."""
    stored = golden("cm_trajectory_b32_d64_k24")
    variant = f"{'hard' if use_hard else 'cm'}_m{momentum}"
    start = stored.tensor("features_before")
    recipe = ClusterContrast(ClusterContrastConfig(use_hard=use_hard, momentum=momentum), Images(len(start)))
    recipe.build(network(start.shape[1]))
    recipe.begin_epoch(start, torch.arange(len(start)), epoch=0)  # clusters of one image: rows are these
    for step, (x, targets) in enumerate(zip(stored.tensor("inputs"), stored.tensor("targets"), strict=True)):
        batch = Batch(views=(), indices=targets, targets=targets)
        loss = recipe.loss(x.requires_grad_(), batch)
        loss.backward()
        recipe.update(x.detach(), batch)
        assert loss.item() == pytest.approx(stored[f"loss_{variant}"][step], rel=1e-5, abs=1e-6)
        if step + 1 in (1, 2, 3, 5, 10):
            rows = stored.tensor(f"features_each_step_{variant}")[(1, 2, 3, 5, 10).index(step + 1)]
            torch.testing.assert_close(recipe.memory.features, rows, atol=5e-6, rtol=0)
    torch.testing.assert_close(x.grad, stored.tensor(f"grad_last_{variant}"), atol=2e-6, rtol=1e-4)


def test_un_clustered_images_neither_start_a_row_nor_are_drawn():
    labels = torch.tensor([0, 0, 0, 0, -1, 1, 1, 1, 1, -1])
    features = F.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    recipe = ClusterContrast(ClusterContrastConfig(batch_size=8, num_instances=4, iters=3), Images(10))
    recipe.build(network(8))
    recipe.begin_epoch(features, labels, epoch=0)
    expected = F.normalize(torch.stack([features[:4].mean(0), features[5:9].mean(0)]), dim=1)
    torch.testing.assert_close(recipe.memory.features, expected)
    assert not {row for batch in recipe.batches(labels, 0) for row in batch} & {4, 9}


def test_average_and_gem_pooling_are_both_to_be_had(smoke):
    gem, avg = smoke("cluster_contrast", "gem"), smoke("cluster_contrast", "avg", pooling_type="avg", use_hard=True)
    assert "pooling.p" in gem.model.state_dict()
    assert "pooling.p" not in avg.model.state_dict()
    assert np.isfinite([gem.last["loss"], avg.last["loss"]]).all()


@pytest.mark.skipif(importlib.util.find_spec("infomap") is None, reason="infomap is not installed (extra [infomap])")
def test_infomap_without_a_cluster_names_its_own_settings(smoke):
    with pytest.raises(NoClustersError, match=r"un-clustered at Infomap, k1 8, min_similarity 1.0, .* Lower min_sim"):
        smoke("cluster_contrast_infomap", min_similarity=1.0)


@pytest.mark.skipif(importlib.util.find_spec("infomap") is None, reason="infomap is not installed (extra [infomap])")
def test_infomap_labels_two_epochs(smoke):
    run = smoke("cluster_contrast_infomap", min_size=2, min_similarity=0.2, quiet=False)
    assert run.last["clusters"] > 1
    assert np.isfinite(run.last["loss"])
    log = (run.folder / "log.txt").read_text()
    assert re.search(r"labels +Infomap, k1 8, min_similarity 0.2, min_size 2", log)


def test_infomap_settings_are_the_published_commands():
    config = ClusterContrastInfomapConfig.for_dataset("market1501")
    assert (config.k1, config.min_similarity, config.min_size, config.iters) == (15, 0.5, 5, 200)
    with pytest.raises(ValueError, match=r"min_similarity must lie in \(0, 1\], got 0"):
        ClusterContrastInfomapConfig(min_similarity=0.0)
    with pytest.raises(ValueError, match="min_size must be at least 1"):
        ClusterContrastInfomapConfig(min_size=0)


def test_without_infomap_the_method_says_so_before_any_work(monkeypatch):
    absent = dataclasses.replace(_env.infomap(), present=False)
    monkeypatch.setattr(_env, "infomap", lambda: absent)
    with pytest.raises(RuntimeError, match=r"infomap must be installed for cluster_contrast_infomap"):
        ClusterContrastInfomap(ClusterContrastInfomapConfig(), Images(4))

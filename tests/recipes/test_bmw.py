# SPDX-License-Identifier: Apache-2.0
"""BMW: the recipe's own objects against the rule as the paper's code has it, written out here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.bmw import BMW, BMWConfig


def published_update(memory, x, targets, pull, push):
    """Row after row in order of first appearance; the nearest other row may have moved already."""
    memory, x = memory.clone(), F.normalize(x, dim=1)
    for c in dict.fromkeys(targets.tolist()):
        own = x[targets == c]
        hard = own[(own @ memory[c]).argmin()]
        near = memory @ memory[c]
        near[c] = -np.inf
        other = memory[near.argmax()]
        attract = (1 - memory[c] @ hard) * (memory[c] - hard)
        repel = (1 + memory[c] @ other) * (memory[c] + other)
        memory[c] = F.normalize(memory[c] - pull * attract - push * repel, dim=0)
    return memory


def recipe_and_batch(*, compat=False, rows=6, size=24, dim=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows).repeat_interleave(4)
    features = F.normalize(torch.randn(len(labels), dim, generator=generator), dim=1)
    recipe = BMW(BMWConfig(compat=compat), Images(len(labels)))
    network = nn.Identity()
    network.num_features = dim
    recipe.build(network)
    recipe.begin_epoch(features, labels, epoch=0)
    indices = torch.randint(len(labels), (size,), generator=generator)
    x = torch.randn(size, dim, generator=generator)
    return recipe, x, Batch(views=(), indices=indices, targets=labels[indices])


def test_compat_moves_row_after_row_as_published():
    recipe, x, batch = recipe_and_batch(compat=True)
    expected = published_update(recipe.memory.features, x, batch.targets, pull=0.9, push=0.2)
    recipe.update(x, batch)
    torch.testing.assert_close(recipe.memory.features, expected, atol=1e-6, rtol=0)


def test_by_default_all_rows_look_at_the_memory_as_it_was():
    recipe, x, batch = recipe_and_batch()
    before = recipe.memory.features.clone()
    expected = before.clone()
    for c in batch.targets.unique():
        chosen = batch.targets == c
        expected[c] = published_update(before, x[chosen], batch.targets[chosen], pull=0.9, push=0.2)[c]
    recipe.update(x, batch)
    torch.testing.assert_close(recipe.memory.features, expected, atol=1e-6, rtol=0)
    sequential, x, batch = recipe_and_batch(compat=True)
    sequential.update(x, batch)
    assert not torch.allclose(recipe.memory.features, sequential.memory.features, atol=1e-4), "the order has a say"


def test_the_loss_is_cluster_contrasts():
    recipe, x, batch = recipe_and_batch()
    logits = F.normalize(x, dim=1) @ recipe.memory.features.T / 0.05
    torch.testing.assert_close(recipe.loss(x, batch), F.cross_entropy(logits, batch.targets))


def test_one_cluster_has_nothing_to_be_pushed_from():
    recipe, x, batch = recipe_and_batch(rows=1)
    recipe.update(x, batch)
    assert torch.isfinite(recipe.memory.features).all()
    torch.testing.assert_close(recipe.memory.features.norm(dim=1), torch.ones(1))


def test_settings_are_the_logs():
    config = BMWConfig.for_dataset("market1501")
    assert (config.epochs, config.iters, config.step_size, config.weights) == (75, 200, 25, "imagenet_v2")
    assert (config.batch_size, config.num_instances, config.bn_group) == (256, 16, None)
    assert config.reset_optimizer
    with pytest.raises(ValueError, match="push_weight must be 0 or more, got -1"):
        BMWConfig(push_weight=-1.0)
    with pytest.raises(ValueError, match="use_hard must be False"):
        BMWConfig(use_hard=True)


def test_two_epochs(smoke):
    assert np.isfinite(smoke("bmw").last["loss"])

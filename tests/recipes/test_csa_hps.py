# SPDX-License-Identifier: Apache-2.0
"""CSA + HPS, our design: its numbers worked out by hand, what attention does with an intruder, a run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.csa_hps import CSAHPS, Aggregation, CSAHPSConfig, least_attended, train_aggregation

# worked out in float64: one head, scale 10, three images of a person and a stranger
ROWS = F.normalize(torch.tensor([[1, 0, 0], [0.98, 0.199, 0], [0.98, 0, 0.199], [0.5, 0, -0.866]]), dim=1)
RECEIVED = [0.394752, 0.346669, 0.256354, 0.002225]
PROTOTYPE = [0.996339, 0.069652, 0.049561]


class Backbone(nn.Linear):
    """As much of a network as a recipe asks for."""

    def __init__(self, width):
        super().__init__(4, width)
        self.num_features = width


def recipe_with(width, **settings):
    recipe = CSAHPS(CSAHPSConfig(**settings), Images(100))
    recipe.build(Backbone(width))
    return recipe


def test_the_numbers_worked_out_by_hand():
    aggregation = Aggregation(3, heads=1, scale=10.0)
    labels = torch.zeros(4, dtype=torch.int64)
    received = aggregation.received(ROWS, labels)[:, 0]
    torch.testing.assert_close(received, torch.tensor(RECEIVED), atol=2e-5, rtol=0)
    torch.testing.assert_close(aggregation(ROWS, labels)[0], torch.tensor(PROTOTYPE), atol=2e-5, rtol=0)
    dispersion = -torch.log(4 * received)
    torch.testing.assert_close(dispersion, torch.tensor([-0.4568, -0.3269, -0.0251, 4.7219]), atol=2e-2, rtol=0)
    assert least_attended(received, labels, 1).tolist() == [3]


def test_untrained_and_uniform_attention_is_the_centroid():
    """Images that are all equally alike attend to each other equally: Cluster Contrast's start of a memory."""
    corners = torch.eye(6)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    prototypes = Aggregation(6, heads=2, scale=10.0)(corners, labels)
    torch.testing.assert_close(prototypes, F.normalize(torch.stack([corners[:3].sum(0), corners[3:].sum(0)]), dim=1))


def test_the_memory_moves_to_the_image_its_peers_attend_to_least():
    recipe = recipe_with(3, heads=1, saa_steps=0, momentum=0.1)
    recipe.begin_epoch(ROWS, torch.zeros(4, dtype=torch.int64), epoch=0)
    torch.testing.assert_close(recipe.memory.features[0], torch.tensor(PROTOTYPE), atol=2e-5, rtol=0)
    before = recipe.memory.features.clone()
    batch = Batch(views=(), indices=torch.arange(4), targets=torch.zeros(4, dtype=torch.int64))
    recipe.update(ROWS, batch)
    torch.testing.assert_close(recipe.memory.features[0], F.normalize(0.1 * before[0] + 0.9 * ROWS[3], dim=0))


def test_least_attended_takes_the_first_of_equals_and_leaves_absent_classes():
    received = torch.tensor([0.5, 0.2, 0.2, 0.9, 0.0, 0.3])
    targets = torch.tensor([2, 2, 2, 0, -1, 0])
    assert least_attended(received, targets, 4).tolist() == [5, -1, 1, -1]


def crowd(intruders, width=16, seed=0, noise=0.5):
    """20 clusters of 16; in each, ``intruders`` images are of the next person, who was mistaken for this one."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, width, generator=generator)
    labels = torch.arange(20).repeat_interleave(16)
    wrong = torch.arange(320) % 16 < intruders
    x = centres[(labels + wrong) % 20] + noise * torch.randn(320, width, generator=generator)
    return F.normalize(x, dim=1), labels, wrong


def test_attention_weakens_an_intruder_and_training_weakens_it_more():
    """Trained on clusters of one person each, with intruders put in on purpose."""
    (x, labels, wrong), (pure, of_whom, _) = crowd(1, noise=0.3), crowd(0, noise=0.3)
    aggregation = Aggregation(16, heads=4, scale=10.0)

    def share():
        with torch.no_grad():
            return aggregation.received(x, labels).mean(1)[wrong].sum().item() / 20

    untrained = share()
    assert untrained < 0.75 / 16, "one of 16 images, less than its share of the attention"
    train_aggregation(aggregation, pure, of_whom, steps=100, lr=1e-3, noise=0.1, temperature=0.05, seed=(0,))
    assert share() < 0.95 * untrained


def test_clusters_that_are_mixed_already_teach_the_attention_the_reverse():
    """A weakness of our objective: images that must be found include the intruders, so it pays to attend to them."""
    x, labels, wrong = crowd(1, noise=0.3)
    aggregation = Aggregation(16, heads=4, scale=10.0)
    untrained = aggregation.received(x, labels).mean(1)[wrong].sum().item()
    train_aggregation(aggregation, x, labels, steps=100, lr=1e-3, noise=0.1, temperature=0.05, seed=(0,))
    assert aggregation.received(x, labels).mean(1)[wrong].sum().item() > 2 * untrained


def test_intruders_that_are_alike_keep_their_share():
    """What the design cannot do, whatever its paper's does: each image hands out one unit, to those like itself."""
    x, labels, wrong = crowd(4, noise=0.1)
    received = Aggregation(16, heads=4, scale=10.0).received(x, labels).mean(1)
    assert received[wrong].sum() / 20 > 0.9 * 4 / 16


def test_training_repeats_and_is_not_the_backbones_business():
    x, labels, _ = crowd(1)
    weights = []
    for _ in range(2):
        recipe = recipe_with(16, heads=4, saa_steps=3)
        recipe.begin_epoch(x, labels, epoch=2)
        weights.append(recipe.aggregation.query.detach())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.eye(16))
    assert len([p for p in recipe.parameters() if p.requires_grad]) == 2, "the attention is moved by its own optimiser"
    untouched = recipe_with(16, heads=4, saa_steps=3)
    untouched.begin_epoch(x, torch.zeros_like(labels), epoch=0)  # one cluster: nothing to tell apart
    assert torch.equal(untouched.aggregation.query, torch.eye(16))


def test_clusters_of_one_image_and_un_clustered_images():
    recipe = recipe_with(8, saa_steps=2)
    x = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    recipe.begin_epoch(x, torch.tensor([1, -1, 0, 1, -1]), epoch=0)
    assert recipe.memory.features.shape == (2, 8)
    torch.testing.assert_close(recipe.memory.features[0], x[2])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"heads": 0}, "heads must be at least 1"),
        ({"saa_noise": 1.5}, r"saa_noise must lie in \[0, 1\], got 1.5"),
        ({"saa_steps": -1}, "saa_steps must be 0 or more"),
        ({"use_hard": True}, "use_hard must be False"),
    ],
)
def test_bad_settings_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        CSAHPSConfig(**setting)


def test_heads_must_divide_the_features():
    with pytest.raises(ValueError, match="heads must divide the 10 numbers of a feature, got 8"):
        recipe_with(10)


def test_two_epochs_and_the_attention_is_kept(smoke):
    run = smoke("csa_hps", saa_steps=3)
    assert np.isfinite(run.last["loss"])
    from safetensors.torch import load_file

    kept = load_file(run.folder / "state.safetensors")
    assert "recipe.aggregation.query" in kept
    assert not any("aggregation" in name for name in load_file(run.folder / "model_last.safetensors"))

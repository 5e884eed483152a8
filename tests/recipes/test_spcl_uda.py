# SPDX-License-Identifier: Apache-2.0
"""SpCL on two domains: one memory, two BatchNorms, the published order of backward on request."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.models import build_model
from fastreid_u.models.reid import ReIDModel
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes import get_method
from fastreid_u.recipes.spcl_uda import SpCLUDA, SpCLUDAConfig

PEOPLE, IMAGES, WIDTH = 5, 14, 8


def network(width=WIDTH):
    torch.manual_seed(0)
    backbone = nn.Linear(width, width)
    backbone.num_features = width
    return ReIDModel(backbone, nn.Identity(), arch="linear")


def unit(*shape, number=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(number)), dim=-1)


def recipe(**settings):
    """Five source people of three images each, the last of which nobody can read; 14 target images in 2 clusters."""
    pids = torch.arange(PEOPLE).repeat_interleave(3)
    made = SpCLUDA(SpCLUDAConfig(temp=0.1, **settings), Images(IMAGES, source=Images(len(pids), pids=pids)))
    made.build(network())
    rows = {"target": unit(IMAGES, WIDTH, number=1), "source": unit(3 * PEOPLE, WIDTH, number=2)}
    rows["source"][-1] = torch.nan
    made.images.source.readable[-1] = False
    features = made.features(lambda _, of="target": rows[of], epoch=0)
    labels = torch.tensor([0] * 5 + [1] * 6 + [-1] * 3)
    made.begin_epoch(features, labels, epoch=0)
    return made, rows, labels


def step():
    """A batch with repeated images, and what the network made of it."""
    indices, identities = torch.tensor([0, 3, 3, 7, 12, 8]), torch.tensor([2, 2, 0, 1, 2, 4])
    source = Batch(views=(), indices=torch.arange(6), targets=identities)
    batch = Batch(views=(), indices=indices, targets=torch.zeros(6, dtype=torch.int64), source=source)
    return batch, unit(6, WIDTH, number=3).requires_grad_(), unit(6, WIDTH, number=4).requires_grad_()


class PublishedMemory(torch.autograd.Function):
    """Similarities to all rows; backward carries the gradient through the rows as they are by then, then moves them."""

    @staticmethod
    def forward(ctx, x, rows, memory, momentum):
        ctx.save_for_backward(x, rows)
        ctx.memory, ctx.momentum = memory, momentum
        return x @ memory.T

    @staticmethod
    def backward(ctx, upstream):
        x, rows = ctx.saved_tensors
        gradient = upstream @ ctx.memory
        for feature, row in zip(x, rows.tolist(), strict=True):
            ctx.memory[row] = F.normalize(ctx.momentum * ctx.memory[row] + (1 - ctx.momentum) * feature, dim=0)
        return gradient, None, None, None


def published_loss(x, rows, memory, labels, temp=0.1, momentum=0.2):
    similarity = PublishedMemory.apply(x, rows, memory, momentum) / temp
    count = torch.bincount(labels).float()
    sums = torch.zeros(len(x), len(count)).index_add(1, labels, similarity)
    weight = torch.exp(sums / count.clamp(min=1)) * (count > 0)
    p = weight / (weight.sum(dim=1, keepdim=True) + 1e-6)
    return -torch.log(p.gather(1, labels[rows][:, None]) + 1e-6).mean()


@pytest.mark.parametrize("compat", [False, True])
def test_a_step_is_the_published_one(compat):
    """By default both gradients read the old rows; published, autograd runs the target's part first (``compat``)."""
    made, _, _ = recipe(compat=compat)
    batch, own, labelled = step()
    before = made.memory.features.clone()
    loss = made.loss((own, labelled), batch)
    loss.backward()
    assert torch.equal(made.memory.features, before)  # nothing moves before ``update``
    made.update((own.detach(), labelled.detach()), batch)

    classes = torch.tensor([0] * 5 + [1] * 6 + [2, 3, 4])
    labels = torch.cat([torch.arange(PEOPLE), classes + PEOPLE])
    memory = before.clone()
    other = before.clone() if not compat else memory  # apart, the source's gradient sees the rows as they were
    x, y = own.detach().requires_grad_(), labelled.detach().requires_grad_()
    expected = published_loss(y, batch.source.targets, other, labels)
    expected = expected + published_loss(x, batch.indices + PEOPLE, memory, labels)  # made later, so it goes back first
    expected.backward()
    memory[:PEOPLE] = other[:PEOPLE]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(own.grad, x.grad, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(labelled.grad, y.grad, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(made.memory.features, memory, rtol=0, atol=1e-6)


def test_the_two_orders_differ():
    gradients = []
    for compat in (False, True):
        made, _, _ = recipe(compat=compat)
        batch, own, labelled = step()
        made.loss((own, labelled), batch).backward()
        gradients.append(labelled.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_the_memory_starts_at_identity_means_and_images():
    made, rows, labels = recipe()
    assert made.memory.features.shape == (PEOPLE + IMAGES, WIDTH)
    means = F.normalize(rows["source"].reshape(PEOPLE, 3, WIDTH).nanmean(dim=1), dim=1)
    torch.testing.assert_close(made.memory.features[:PEOPLE], means)
    torch.testing.assert_close(made.memory.features[PEOPLE:], rows["target"])
    assert made.memory.labels.tolist() == [*range(PEOPLE), *[5] * 5, *[6] * 6, 7, 8, 9]
    assert made.begin_epoch(made.memory.features, labels, 0).tolist() == [0] * 5 + [1] * 6 + [2, 3, 4]
    again = made.features(None, epoch=1)
    torch.testing.assert_close(again, rows["target"])


def test_people_and_images_nobody_could_read():
    pids = torch.tensor([0, 0, 1, 1, 2, 2])
    made = SpCLUDA(SpCLUDAConfig(), Images(4, source=Images(6, pids=pids)))
    made.build(network())
    rows = {"target": unit(4, WIDTH), "source": unit(6, WIDTH)}
    rows["source"][2:] = torch.nan  # persons 1 and 2
    rows["target"][3] = torch.nan
    made.images.source.readable[2:] = False
    made.images.readable[3] = False
    features = made.features(lambda _, of="target": rows[of], epoch=0)
    labels = torch.tensor([0, 0, 0, -1])
    targets = made.begin_epoch(features, labels, epoch=0)
    assert not made.memory.features[1:3].any()
    assert targets.tolist() == [0, 0, 0, -1]
    source = Batch(views=(), indices=torch.tensor([0, 1]), targets=torch.tensor([0, 0]))
    batch = Batch(views=(), indices=torch.tensor([0, 1]), targets=torch.tensor([0, 0]), source=source)
    assert torch.isfinite(made.loss((features[:2], rows["source"][:2]), batch))


def test_each_domain_has_its_norms_and_the_target_is_evaluated():
    made = SpCLUDA(SpCLUDAConfig(), Images(4, source=Images(4, pids=torch.tensor([0, 0, 1, 1]))))
    made.build(build_model("resnet10", pooling="avg", weights=None, bn_group=4, seed=0))
    made.train()
    images = torch.randn(2, 8, 3, 32, 16)
    source = Batch(views=(images[1] + 3,), indices=torch.arange(8), targets=torch.zeros(8, dtype=torch.int64))
    batch = Batch(views=(images[0],), indices=torch.arange(8), targets=torch.zeros(8, dtype=torch.int64), source=source)
    own, labelled = made.forward(batch)
    neck = made.model.bnneck
    for x, images_of, norm in ((own, images[0], neck.target), (labelled, images[1] + 3, neck.source)):
        alone = build_model("resnet10", pooling="avg", weights=None, bn_group=4, seed=0).train()
        torch.testing.assert_close(x, alone(images_of))
        torch.testing.assert_close(norm.running_mean, alone.bnneck.running_mean)
    assert not torch.equal(neck.source.running_mean, neck.target.running_mean)
    ranked = made.ranked()["model"]
    assert torch.equal(ranked.bnneck.running_mean, neck.target.running_mean)
    assert ranked.state_dict().keys() == alone.state_dict().keys()


@pytest.mark.parametrize("compat", [False, True])
def test_the_necks_bias_is_frozen_or_as_published(compat):
    made, _, _ = recipe(compat=compat)
    necks = (made.model.bnneck.source, made.model.bnneck.target)
    assert [neck.bias.requires_grad for neck in necks] == [compat, compat]


def test_defaults_are_the_published_ones():
    config = SpCLUDAConfig.for_dataset("msmt17")
    assert (config.batch_size, config.num_instances, config.bn_group, config.iters) == (64, 4, 16, 800)
    assert (config.temp, config.momentum, config.eps, config.eps_gap) == (0.05, 0.2, 0.6, 0.02)
    assert config.source is None
    assert get_method("spcl_uda") is SpCLUDA


def test_without_a_source_it_says_so(tiny_world, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    with pytest.raises(ValueError, match="source must name a labelled set for method 'spcl_uda', got None"):
        fastreid_u.train(dataset, method="spcl_uda", logs_dir=tmp_path / "run", weights=None, quiet=True)
    with pytest.raises(ValueError, match="source must hold other images than the set to learn"):
        fastreid_u.train(dataset, method="spcl_uda", source=str(tiny_world), logs_dir=tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="method 'spcl_uda' needs source, a labelled data set to learn from, got none"):
        SpCLUDA(SpCLUDAConfig(), Images(4, source=Images(4)))
    assert not (tmp_path / "run").exists()


def test_two_epochs(tiny_world, tiny_source, tmp_path):
    run = fastreid_u.train(
        load_dataset("market1501", tiny_world), method="spcl_uda", source=str(tiny_source), logs_dir=tmp_path / "run",
        height=64, width=32, arch="resnet10", weights=None, bn_group=8, batch_size=16, iters=3, epochs=2, workers=0,
        k1=8, k2=3, eps_gap=0.1, center_per_camera=True, calibrate_bn=2, eval_step=2, quiet=True, device="cpu",
    )  # fmt: skip
    assert all(np.isfinite(record["loss"]) and record["clusters"] > 1 for record in run.records)
    state = load_file(run.folder / "state.safetensors")
    assert len(state["recipe.memory.features"]) == 6 + 72
    assert not torch.equal(
        state["recipe.model.bnneck.source.running_mean"], state["recipe.model.bnneck.target.running_mean"]
    )
    plain, _ = fastreid_u.load_model(run.folder)
    assert torch.equal(plain.bnneck.running_mean, state["recipe.model.bnneck.target.running_mean"])

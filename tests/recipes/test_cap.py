# SPDX-License-Identifier: Apache-2.0
"""CAP through its recipe: the published code's numbers, twenty steps against a plain re-statement, odd data, a run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.engine.optimizer import learning_rate
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.cap import CAP, CAPConfig

SMALL = dict(
    method="cap", height=64, width=32, arch="resnet10", weights=None, batch_size=16, num_instances=4, iters=3,
    epochs=2, workers=0, k1=8, k2=3, center_per_camera=True, calibrate_bn=2, eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


def recipe(camids, width=8, **settings):
    camids = torch.as_tensor(camids).long()
    made = CAP(CAPConfig(**settings), Images(len(camids), camids))
    network = nn.Identity()
    network.num_features = width
    made.build(network)
    return made


def batch(recipe, targets, rows, epoch=0):
    return Batch((), rows, targets[rows], recipe.images.camids[rows], epoch=epoch)


def step(recipe, x, seen):
    """Loss and gradient of one step; the memory moves, as the engine has it."""
    x = x.clone().requires_grad_()
    loss = recipe.loss(x, seen)
    loss.backward()
    recipe.update(x.detach(), seen)
    return loss.detach(), x.grad


def proxies(labels, camids):
    """(camera, cluster) of every proxy in the published order."""
    return sorted({(camid, label) for camid, label in zip(camids.tolist(), labels.tolist(), strict=True) if label >= 0})


def from_golden(golden, name):
    """A recipe whose images are the published prototypes themselves, and targets for all images."""
    stored = golden(name)
    labels, camids = stored.tensor("pseudo_labels"), stored.tensor("cams")
    prototypes = torch.cat([stored.tensor(f"prototypes_cam{camid}") for camid in range(stored.meta["params"]["cams"])])
    row = {pair: i for i, pair in enumerate(proxies(labels, camids))}
    of = [row.get(pair, 0) for pair in zip(camids.tolist(), labels.tolist(), strict=True)]
    return stored, recipe(camids, prototypes.shape[1], compat=True), prototypes[of], labels


@pytest.mark.parametrize("name", ["cap_losses_many_proxies", "cap_losses_few_proxies"])
@pytest.mark.parametrize(("epoch", "terms"), [(4, "intra"), (5, "intra_plus_inter")])
def test_loss_gradient_and_memory_of_the_published_code(golden, name, epoch, terms):
    stored, cap, features, labels = from_golden(golden, name)
    targets = cap.begin_epoch(features, labels, epoch)
    for i, (x, rows) in enumerate(zip(stored.tensor("inputs"), stored.tensor("indexes"), strict=True)):
        loss, grad = step(cap, x, batch(cap, targets, rows, epoch))
        torch.testing.assert_close(loss, stored.tensor(f"loss_{terms}")[i], rtol=1e-5, atol=1e-6)
        theirs = stored.tensor(f"grad_{terms}")[i]  # to the network's unit output; ours is behind one more scaling to 1
        theirs = theirs - (theirs * x).sum(1, keepdim=True) * x
        torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=2e-6)
        after = f"memory_after_step{i + 1}_{terms}"
        if after in stored:
            torch.testing.assert_close(cap.memory.features, stored.tensor(after), rtol=0, atol=1e-6)


def test_labels_and_proxies_of_the_published_code(golden):
    stored = golden("cap_grouping_n240_eps0.6")
    features = F.normalize(stored.tensor("features_raw"))
    cap = recipe(stored["cams"], features.shape[1], eps=0.6)
    labels = cap.labels(features, 0)
    assert torch.equal(labels, stored.tensor("labels"))
    cap.begin_epoch(features, labels, 0)
    for camid in range(5):
        own = cap.memory.cameras == camid
        torch.testing.assert_close(cap.memory.features[own], stored.tensor(f"prototypes_cam{camid}"), rtol=0, atol=1e-6)
        assert cap.memory.clusters[own].diff().gt(0).all()


def test_raw_features_are_averaged_as_unit_rows(golden):
    stored = golden("cap_grouping_n300_eps0.5")
    cap = recipe(stored["cams"], stored["features_raw"].shape[1])
    cap.begin_epoch(stored.tensor("features_raw"), stored.tensor("labels"), 0)
    theirs = torch.cat([stored.tensor(f"prototypes_cam{camid}") for camid in range(4)])
    torch.testing.assert_close(cap.memory.features, theirs, rtol=0, atol=1e-6)


def published_step(x, labels, camids, memory, *, inter, temp=0.07, momentum=0.2, negatives=50):
    """The published step, in words of one syllable; ``memory`` is {(camera, cluster): row}, moved in place.

    Returns the loss; call the result's second part after backward.
    """
    keys = sorted(memory)
    loss = 0
    for camera in sorted(set(camids)):
        own = [i for i, camid in enumerate(camids) if camid == camera]
        here = [key for key in keys if key[0] == camera]
        logits = x[own] @ torch.stack([memory[key] for key in here]).T / temp
        row = torch.tensor([here.index((camera, labels[i])) for i in own])
        loss = loss + F.cross_entropy(logits, row)
        if inter:
            logits = x[own] @ torch.stack([memory[key] for key in keys]).T / temp
            for line, i in zip(logits, own, strict=True):
                same = torch.tensor([key[1] == labels[i] for key in keys])
                hardest = line.detach().masked_fill(same, -1e4).argsort(descending=True)[:negatives]
                chosen = torch.cat([line[same], line[hardest]])
                loss = loss - 0.5 / len(own) * F.log_softmax(chosen, 0)[: same.sum()].mean()

    def update():
        for row, label, camera in zip(x.detach(), labels, camids, strict=True):
            moved = momentum * memory[camera, label] + (1 - momentum) * row
            memory[camera, label] = moved / moved.norm()

    return loss, update


def test_twenty_steps_equal_a_plain_restatement():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(30).repeat_interleave(12)
    camids = torch.randint(4, (360,), generator=rng)
    labels[::17] = -1
    pixels = torch.randn(30, 24, generator=rng)[labels] + 0.8 * torch.randn(360, 24, generator=rng)
    weight = torch.randn(16, 24, generator=rng) / 5
    features = F.normalize(pixels @ weight.T)

    cap = recipe(camids, 16, inter_start=0)
    ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
    optimizers = [torch.optim.Adam([w], lr=1e-2, weight_decay=5e-4) for w in (ours, theirs)]
    targets = cap.begin_epoch(features, labels, 0)
    memory = {
        (camera, label): F.normalize(features[(labels == label) & (camids == camera)].mean(0), dim=0)
        for camera, label in proxies(labels, camids)
    }
    order = torch.tensor(cap.batches(targets, 0))[:20]
    assert len(order) == 10  # an epoch has as many steps as the clustered images fill batches
    order = torch.cat([order, order.flip(0)])

    for rows in order:
        losses = []
        for which, w in enumerate((ours, theirs)):
            x = F.normalize(pixels[rows] @ w.T)
            if which == 0:
                seen = batch(cap, targets, rows)
                losses.append(cap.loss(x, seen))
                update = lambda x=x, seen=seen: cap.update(x.detach(), seen)  # noqa: E731
            else:
                loss, update = published_step(x, labels[rows].tolist(), camids[rows].tolist(), memory, inter=True)
                losses.append(loss)
            optimizers[which].zero_grad()
            losses[-1].backward()
            update()
            optimizers[which].step()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        cap.memory.features, torch.stack([memory[key] for key in sorted(memory)]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_published_defaults():
    config = CAPConfig()
    assert (config.eps, config.k1, config.k2, config.min_samples) == (0.5, 20, 6, 4)
    assert (config.temp, config.momentum, config.hard_negatives, config.inter_weight) == (0.07, 0.2, 50, 0.5)
    assert (config.batch_size, config.num_instances, config.epochs, config.stem_relu) == (32, 4, 50, False)
    rates = [learning_rate(config, epoch) / 3.5e-4 for epoch in (0, 5, 9, 10, 19, 20, 39, 40)]
    assert rates == pytest.approx([0.01, 0.505, 0.901, 1, 1, 0.1, 0.1, 0.01])
    (view,) = recipe([0, 1]).views()
    assert (view.steps[-1].area, view.steps[-1].aspect, view.steps[-1].p) == ((0.02, 0.2), (0.3, 3.0), 0.5)


@pytest.mark.parametrize(
    "wrong", [{"temp": 0.0}, {"momentum": 1.5}, {"inter_weight": -1.0}, {"inter_start": -1}, {"hard_negatives": 0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"config: {next(iter(wrong))} must"):
        CAPConfig(**wrong)


def test_a_batch_holds_proxies():
    labels = torch.arange(12).repeat_interleave(10)
    labels[:5] = -1
    camids = torch.arange(120) % 3
    cap = recipe(camids)
    targets = cap.begin_epoch(F.normalize(torch.randn(120, 8)), labels, 0)
    assert torch.equal(targets < 0, labels < 0)
    stream = np.array(cap.batches(targets, 0)).ravel()
    assert len(stream) == 115 // 32 * 32
    for group in stream.reshape(-1, 4):
        assert len({(labels[i].item(), camids[i].item()) for i in group}) == 1
    for eight in stream.reshape(-1, 8, 4):
        assert len(set(targets[eight[:, 0]].tolist())) == 8
    assert [len(b) for b in recipe(camids, iters=7).batches(targets, 0)] == 7 * [32]


def test_camera_numbers_may_be_anything():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(60, 8, generator=generator))
    labels, camids = torch.arange(60) % 6, torch.arange(60) // 20
    losses = []
    for numbers in ([0, 1, 2], [3, 41, 1000]):
        cap = recipe(torch.tensor(numbers)[camids])
        targets = cap.begin_epoch(features, labels, 5)
        losses.append(cap.loss(features, batch(cap, targets, torch.arange(60), 5)))
    assert torch.equal(*losses)


def test_a_camera_with_one_proxy_teaches_nothing_within_itself():
    features = F.normalize(torch.randn(8, 4))
    cap = recipe([0] * 8, 4)
    targets = cap.begin_epoch(features, torch.zeros(8, dtype=torch.int64), 0)
    loss, grad = step(cap, features, batch(cap, targets, torch.arange(8)))
    assert loss == 0
    assert not grad.any()


def test_a_proxy_of_one_image_is_drawn_four_times_and_few_proxies_repeat():
    labels, camids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1]), [0, 0, 0, 1, 0, 0, 0, 0, 0]
    cap = recipe(camids, 4)
    targets = cap.begin_epoch(F.normalize(torch.randn(9, 4)), labels, 0)
    with pytest.warns(RuntimeWarning, match="too few clusters to fill a batch of 32"):
        stream = np.array(cap.batches(targets, 0)).ravel()
    assert len(stream) == 32  # fewer images than a batch still make a step
    assert [3, 3, 3, 3] in stream.reshape(-1, 4).tolist()
    assert 8 not in stream


def test_unreadable_images_sit_out():
    features = F.normalize(torch.randn(12, 4))
    features[5] = torch.nan
    labels = torch.arange(12) % 2
    labels[5] = -1
    cap = recipe([0, 1, 2] * 4, 4)
    targets = cap.begin_epoch(features, labels, 0)
    assert torch.isfinite(cap.memory.features).all()
    assert targets[5] == -1


def test_data_without_cameras_are_refused():
    with pytest.raises(ValueError, match="method 'cap' needs images of two cameras or more"):
        CAP(CAPConfig(), Images(4))


def test_two_epochs(tiny_world, tmp_path):
    run = fastreid_u.train(load_dataset("market1501", tiny_world), logs_dir=tmp_path / "run", inter_start=1, **SMALL)
    assert [record["epoch"] for record in run.records] == [0, 1]
    assert all(record["loss"] > 0 and record["clusters"] > 1 for record in run.records)
    assert run.model.describe()["stem_relu"] is False

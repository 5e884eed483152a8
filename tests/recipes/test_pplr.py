# SPDX-License-Identifier: Apache-2.0
"""PPLR through its recipe: worked examples, a plain re-statement of the loss, stripes, agreement, odd data, a run."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.models import build_model
from fastreid_u.models.pooling import AveragePool
from fastreid_u.models.reid import ReIDModel
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.pplr import PPLR, PPLRConfig
from fastreid_u.recipes.pplr_camera import PPLRCamera, PPLRCameraConfig

SMALL = dict(
    height=96, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=3,
    epochs=2, workers=0, k1=8, k2=3, eps=0.5, agreement_k=5, aals_start=1, center_per_camera=True, calibrate_bn=2,
    eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


class Rows(nn.Module):
    """A backbone that hands its input on: maps are made by hand."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images


def recipe(count, camids=None, features=4, recipe_class=PPLR, **settings):
    pplr = recipe_class(recipe_class.Config(**{"agreement_k": 3, **settings}), Images(count, camids))
    pplr.build(ReIDModel(Rows(features), AveragePool(), arch="rows"))
    return pplr


def begun(rows, labels, epoch, camids=None, **settings):
    """A recipe that has begun ``epoch`` with ``rows``, (N, D) of the whole and of each of three parts."""
    pplr = recipe(len(labels), camids, rows[0].shape[1], **settings)
    pplr.images.readable = torch.isfinite(rows[0]).all(dim=1)
    pplr.features(lambda network: torch.cat(rows, dim=1), epoch)
    pplr.begin_epoch(rows[0], labels, epoch)
    return pplr


def worked(epoch, agreement, **settings):
    """Four clusters whose classifiers are the unit vectors, so that the rows of a batch are its logits."""
    pplr = begun([torch.eye(4)] * 4, torch.arange(4), epoch, **settings)
    for weight in pplr.classifiers:
        assert torch.equal(weight[:4], torch.eye(4))
    pplr.agreement = torch.tensor(agreement).expand(4, 3)
    return pplr


def of_one(logits):
    return torch.tensor([logits])


STUDENT = of_one([2.0, 1.0, 0.0, -1.0])
PARTS = of_one([1.5, 1.0, 0.5, 0.0]), of_one([0.0, 2.0, 0.0, 0.0]), of_one([1.0, 1.0, 1.0, 1.0])


def one(epoch):
    """The first image alone."""
    return Batch((), torch.tensor([0]), torch.tensor([0]), epoch=epoch)


def test_parts_refine_the_whole_as_worked_by_hand():
    agreement = [0.2, 0.6, 0.4]
    got = worked(5, agreement).loss((STUDENT, *PARTS), one(5))
    parts = 0.0
    for logits, agreed in zip(PARTS, agreement, strict=True):
        log_p = logits.log_softmax(1)[0]
        parts += (-agreed * log_p[0] + (1 - agreed) * (-math.log(4) - log_p.mean())).item() / 3
    assert (got - parts).item() == pytest.approx(1.049706, abs=2e-6)  # alone in its batch, so no triplet


@pytest.mark.parametrize(("epoch", "value"), [(4, 0.590190), (5, 0.525469)])
def test_smoothing_of_the_parts_as_worked_by_hand(epoch, value):
    got = worked(epoch, [0.25] * 3).loss((STUDENT,) * 4, one(epoch))
    log_p = STUDENT.log_softmax(1)[0]
    target = 0.5 * torch.eye(4)[0] + 0.5 * log_p.exp()
    assert (got + (target * log_p).sum()).item() == pytest.approx(value, abs=2e-6)


def test_triplet_is_on_rows_as_they_are():
    x = torch.tensor([[0.0, 0, 0, 0], [1.2, 0, 0, 0], [0, 1.5, 0, 0]])
    batch = Batch((), torch.arange(3), torch.tensor([0, 0, 1]))
    pplr, zeros = worked(0, [1.0] * 3), torch.zeros(3, 4)
    triplet = pplr.loss((x, zeros, zeros, zeros), batch) - worked_cross_entropy(x, batch.targets)
    apart = math.hypot(1.2, 1.5)
    hardest = [1.2 - 1.5, 1.2 - apart, 1e-6 - 1.5]
    assert triplet.item() == pytest.approx(sum(math.log1p(math.exp(d)) for d in hardest) / 3, rel=1e-5)
    assert math.log1p(math.exp(1.2 - 1.5)) == pytest.approx(0.554355, abs=1e-6)


def worked_cross_entropy(x, targets):
    """The rest of that loss: parts that know nothing, so uniform guesses and a loss of log 4."""
    target = 0.5 * F.one_hot(targets, 4) + 0.125
    return -(target * x.log_softmax(1)).sum(1).mean() + math.log(4)


def plain_loss(x, weights, y, agreement, camids, proxies, *, refined, beta=0.5, camera=0.0):
    """The published loss in float64, one sample after another; ``proxies`` are {(cluster, camera): row} of each x."""
    count, parts = len(y), len(x) - 1
    p = [(rows @ weight.T).softmax(1) for rows, weight in zip(x, weights, strict=True)]
    total = 0
    for i in range(count):
        share = agreement[i].softmax(0)
        target = beta * F.one_hot(y[i], len(weights[0]))
        target = target + (1 - beta) * sum(share[k] * p[1 + k][i].detach() for k in range(parts))
        total = total - (target * p[0][i].log()).sum() / count
        for k in range(parts):
            log_p = p[1 + k][i].log()
            if refined:
                one = -agreement[i, k] * log_p[y[i]]
                one = one + (1 - agreement[i, k]) * (-math.log(len(log_p)) - log_p.mean())
            else:
                one = -0.9 * log_p[y[i]] - 0.1 * log_p.mean()
            total = total + one / (count * parts)
        distance = (x[0][i] - x[0]).square().sum(1).clamp(min=1e-12).sqrt()
        far, near = distance[y == y[i]].max(), distance[y != y[i]].min()
        total = total + F.softplus(far - near) / count
        for k, known in enumerate(proxies):
            unit = F.normalize(x[k][i], dim=0)
            others = [row for (label, camid), row in known.items() if label == y[i] and camid != camids[i]]
            rivals = [unit @ row / 0.07 for (label, _), row in known.items() if label != y[i]]
            rivals = sorted(rivals, reverse=True)[:5]
            for row in others:
                logits = torch.stack([*(unit @ other / 0.07 for other in others), *rivals])
                one = logits.logsumexp(0) - unit @ row / 0.07
                total = total + camera / (1 if k == 0 else parts) * one / (count * len(others))
    return total


@pytest.mark.parametrize("epoch", [4, 5])
@pytest.mark.parametrize("camera_weight", [0.0, 0.7])
def test_loss_and_gradients_equal_a_plain_restatement(epoch, camera_weight):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, 4]).repeat(8)
    camids = torch.randint(3, (40,), generator=generator)
    camids[labels == 4] = 1  # seen by one camera only: no positives in others
    rows = [F.normalize(torch.randn(40, 6, generator=generator)) for _ in range(4)]
    given = {"camera_weight": camera_weight, "hard_negatives": 5}
    pplr = begun(rows, labels, epoch, camids, **given)
    agreement = pplr.agreement
    picked = torch.randperm(40, generator=generator)[:12]
    x = [3 * torch.randn(12, 6, generator=generator) for _ in range(4)]
    batch = Batch((), picked, labels[picked], camids[picked], epoch=epoch)

    ours = [rows.clone().requires_grad_() for rows in x]
    loss = pplr.loss(tuple(ours), batch)
    loss.backward()
    theirs = [rows.double().requires_grad_() for rows in x]
    weights = [w.detach()[:5].double().requires_grad_() for w in pplr.classifiers]
    proxies = [
        {
            (label, camid): F.normalize(own[(labels == label) & (camids == camid)].double().mean(0), dim=0)
            for label in range(5)
            for camid in range(3)
            if ((labels == label) & (camids == camid)).any()
        }
        for own in (rows if camera_weight else [])
    ]
    expected = plain_loss(
        theirs, weights, batch.targets, agreement[picked].double(), batch.camids.tolist(), proxies,
        refined=epoch >= 5, camera=camera_weight,
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(pplr.classifiers, weights, strict=True):
        torch.testing.assert_close(a.grad[:5].double(), b.grad, rtol=1e-4, atol=1e-6)
        assert not a.grad[5:].any()


def test_classifiers_start_at_the_means_of_unit_rows_and_learn():
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(30, 5, generator=generator)) for _ in range(4)]
    labels = torch.arange(30) % 4 - 1
    pplr = begun(rows, labels, 0)
    for weight, own in zip(pplr.classifiers, rows, strict=True):
        for cluster in range(3):
            torch.testing.assert_close(weight[cluster], F.normalize(own[labels == cluster].mean(0), dim=0))
        assert not weight[3:].any()
    learned = {id(p) for p in pplr.parameters() if p.requires_grad}
    assert all(id(w) in learned for w in pplr.classifiers)
    assert all(id(neck.weight) in learned for neck in pplr.part_necks)
    assert list(pplr.ranked()) == ["model"]


def test_agreement_is_the_overlap_of_neighbours():
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(25, 4, generator=generator)) for _ in range(4)]
    for own in rows:
        own[7] = torch.nan  # could not be read
    labels = torch.arange(25) % 3
    labels[7] = -1
    labels[3] = -1  # noise is a neighbour like any other
    agreement = begun(rows, labels, 0, agreement_k=6).agreement
    others = [i for i in range(25) if i != 7]

    def nearest(own, i):
        return set(sorted((j for j in others if j != i), key=lambda j: (own[i] - own[j]).norm().item())[:6])

    for i in others:
        for part in range(3):
            ours, theirs = nearest(rows[0], i), nearest(rows[1 + part], i)
            assert agreement[i, part].item() == pytest.approx(len(ours & theirs) / len(ours | theirs), abs=1e-6)
    assert not agreement[7].any()


def test_parts_are_stripes_with_a_neck_each():
    maps = torch.randn(6, 4, 24, 8, generator=torch.Generator().manual_seed(0))
    pplr = recipe(6)
    pplr.train()
    whole, *parts = pplr.forward(Batch((maps,), torch.arange(6), torch.zeros(6)))
    torch.testing.assert_close(whole, F.batch_norm(maps.mean((2, 3)), None, None, training=True))
    for k, part in enumerate(parts):
        stripe = maps[:, :, 8 * k : 8 * k + 8].mean((2, 3))
        torch.testing.assert_close(part, F.batch_norm(stripe, None, None, training=True))
        torch.testing.assert_close(pplr.part_necks[k].running_mean, 0.1 * stripe.mean(0))
        assert not pplr.part_necks[k].bias.requires_grad


def test_what_is_clustered_is_the_whole_in_eval_mode():
    maps = torch.randn(6, 4, 24, 8, generator=torch.Generator().manual_seed(0))
    pplr = recipe(6)
    pplr.train()
    whole = pplr.features(lambda network: network.eval()(maps).detach(), 0)
    assert torch.equal(whole, pplr.model.eval()(maps))
    for k, part in enumerate(pplr.rows[1:]):
        stripe = maps[:, :, 8 * k : 8 * k + 8].mean((2, 3))
        torch.testing.assert_close(part, F.normalize(stripe), rtol=1e-5, atol=1e-5)


def test_part_necks_take_over_groups_and_calibration():
    model = build_model("resnet10", pooling="avg", weights=None, bn_group=4, seed=0)
    model.bnneck.running_mean.fill_(2.0)
    pplr = PPLR(PPLRConfig(), Images(8))
    pplr.build(model)
    for neck in pplr.part_necks:
        assert (neck.group_size, neck.running_mean[0].item()) == (4, 2.0)
        assert neck.weight is not model.bnneck.weight


def test_a_network_without_a_map_is_refused():
    pplr = recipe(6)
    with pytest.raises(ValueError, match="arch must give a feature map to cut into stripes, got rows from rows"):
        pplr.forward(Batch((torch.randn(6, 4),), torch.arange(6), torch.zeros(6)))


def test_too_many_clusters_are_named():
    rows = [F.normalize(torch.randn(12, 4)) for _ in range(4)]
    with pytest.raises(ValueError, match="max_clusters must hold the 6 clusters of epoch 3, got 5"):
        begun(rows, torch.arange(12) % 6, 3, max_clusters=5)


@pytest.mark.parametrize(("recipe_class", "settings"), [(PPLR, {"camera_weight": 0.5}), (PPLRCamera, {})])
def test_data_without_cameras_are_refused_where_cameras_count(recipe_class, settings):
    with pytest.raises(ValueError, match="needs images of two cameras or more, or camera_weight=0"):
        recipe_class(recipe_class.Config(**settings), Images(4))


def test_camera_numbers_may_be_anything_and_one_camera_teaches_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(24, 6, generator=generator)) for _ in range(4)]
    labels, camids = torch.arange(24) % 4, torch.arange(24) // 8
    x = tuple(torch.randn(24, 6, generator=generator) for _ in range(4))
    losses = []
    for numbers in ([0, 1, 2], [3, 41, 1000], [2, 2, 2]):
        own = torch.tensor(numbers)[camids]
        pplr = begun(rows, labels, 5, own, camera_weight=0.5)
        losses.append(pplr.loss(x, Batch((), torch.arange(24), labels, own, epoch=5)).item())
    plain = begun(rows, labels, 5).loss(x, Batch((), torch.arange(24), labels, epoch=5)).item()
    assert losses[0] == losses[1] > plain
    assert losses[2] == plain


def test_published_defaults():
    config = PPLRConfig()
    assert (config.height, config.width, config.batch_size, config.num_instances) == (384, 128, 64, 4)
    assert (config.parts, config.agreement_k, config.beta, config.aals_start, config.smoothing) == (3, 20, 0.5, 5, 0.1)
    assert (config.eps, config.k1, config.k2, config.bn_group, config.camera_weight) == (0.5, 30, 6, 16, 0.0)
    camera = PPLRCameraConfig.for_dataset("market1501")
    assert (camera.eps, camera.camera_weight) == (0.4, 0.5)
    camera = PPLRCameraConfig.for_dataset("msmt17")
    assert (camera.eps, camera.camera_weight) == (0.6, 1.0)
    for each in (PPLRConfig, PPLRCameraConfig):
        veri = each.for_dataset("veri")
        assert (veri.eps, veri.height, veri.width, veri.num_instances) == (0.7, 256, 256, 8)


@pytest.mark.parametrize(
    "wrong", [{"parts": 0}, {"agreement_k": 0}, {"beta": 1.5}, {"aals_start": -1}, {"camera_temp": 0.0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"config: {next(iter(wrong))} must"):
        PPLRConfig(**wrong)


@pytest.mark.parametrize("method", ["pplr", "pplr_camera"])
def test_two_epochs(method, tiny_world, tmp_path):
    run = fastreid_u.train(load_dataset("market1501", tiny_world), logs_dir=tmp_path / "run", method=method, **SMALL)
    assert [record["epoch"] for record in run.records] == [0, 1]
    assert all(record["loss"] > 0 and record["clusters"] > 1 for record in run.records)
    saved = load_file(run.folder / "model_last.safetensors")
    assert saved.keys() == build_model("resnet10", pooling="avg", weights=None).state_dict().keys()
    state = load_file(run.folder / "state.safetensors")
    assert state["recipe.classifiers.3"].shape == (72, 256)


def test_classifiers_and_part_necks_survive_a_restart(tiny_world, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    states = []
    for folder, lengths in (("unbroken", [2]), ("resumed", [1, 2])):
        for epochs in lengths:
            settings = {**SMALL, "iters": 1, "epochs": epochs, "resume": lengths == [1, 2] and epochs == 2}
            fastreid_u.train(dataset, logs_dir=tmp_path / folder, method="pplr", **settings)
        states.append(load_file(tmp_path / folder / "state.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

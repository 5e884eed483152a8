# SPDX-License-Identifier: Apache-2.0
"""DCCC through the recipe's own objects: published schedules, losses, rows; twenty steps beside a plain restatement."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_u.engine.optimizer import learning_rate
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes.dccc import DCCC, DCCCConfig, scheduled_eps, teacher_momentum


def with_width(network, width):
    network.num_features = width
    return network


RULES = {"wgm": "weighted", "hard": "hard", "avg": "mean", "cc": "sequential"}
TAGS = [
    ("wgm", 0.03, 0.3, 0.1), ("wgm", 0.07, 0.1, 0.1), ("wgm", 0.6, 0.1, 0.1), ("wgm", 0.09, 0.1, 0.2),
    ("hard", 0.09, 0.1, 0.2), ("avg", 0.09, 0.1, 0.2), ("cc", 0.09, 0.1, 0.2),
]  # fmt: skip


@pytest.mark.parametrize(
    "setting", ["expo_0.7_epochs70", "fix_0.6_epochs50", "linear_0.7_epochs70", "step_0.6_epochs50", "log_0.7_epochs70"]
)
def test_eps_of_every_epoch_is_the_published_one(golden, setting):
    scheduler, eps, epochs = setting.split("_")
    config = DCCCConfig(eps_scheduler=scheduler, eps=float(eps), epochs=int(epochs.removeprefix("epochs")))
    recipe = DCCC(config, Images(4))
    stored = golden("dccc_schedules")[f"eps_{setting}_step5"]
    assert [recipe.labels.eps(epoch) for epoch in range(config.epochs)] == pytest.approx(stored.tolist(), abs=1e-12)


def test_the_update_has_one_name():
    with pytest.raises(ValueError, match="use_hard must be False, as update_rule says"):
        DCCCConfig(use_hard=True)


def test_the_learning_rate_warms_up_as_published(golden):
    stored = golden("dccc_schedules")["lr_warmup10_base0.00035"]
    rates = [learning_rate(DCCCConfig(), epoch) for epoch in range(len(stored))]
    assert rates == pytest.approx(stored.tolist(), abs=1e-12)


def test_the_teacher_follows_as_published(golden):
    """The stored student has eight weights; ours are given them after each step."""
    stored = golden("dccc_schedules")
    recipe = DCCC(DCCCConfig(), Images(4))
    recipe.build(with_width(nn.Linear(7, 1), 1))

    def load(network, row):
        with torch.no_grad():
            network.weight.copy_(row[None, :7])
            network.bias.copy_(row[7:])

    student, teacher = stored.tensor("ema_student"), stored.tensor("ema_teacher")
    settings = [recipe.steps, teacher_momentum(98, 0.999), teacher_momentum(99, 0.999), teacher_momentum(100, 0.999)]
    assert settings == [0, 0.999, 0.0, 0.5]
    load(recipe.teacher, teacher[0])
    recipe.steps = 1
    for step in range(1, len(student)):
        load(recipe.model, student[step])
        recipe.follow()
        own = recipe.teacher
        torch.testing.assert_close(
            torch.cat([own.weight[0], own.bias]), teacher[step], atol=1e-6, rtol=0, msg=str(step)
        )


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("soft_ce_weight", [0.3, 1.0])
def test_loss_gradient_and_rows_are_the_published_ones(golden, tag, soft_ce_weight):
    mode, tau_w, smooth, momentum = tag
    name = f"{mode}_tau{tau_w}_s{smooth}_m{momentum}"
    stored = golden("dccc_memory_b48_d64_k30")
    config = DCCCConfig(
        update_rule=RULES[mode], tau_w=tau_w, smooth=smooth, momentum=momentum, soft_ce_weight=soft_ce_weight
    )
    rows = stored.tensor("features_before")
    recipe = DCCC(config, Images(len(rows)))
    recipe.build(with_width(nn.Identity(), rows.shape[1]))
    recipe.begin_epoch(rows, torch.arange(len(rows)), epoch=0)
    targets = stored.tensor("targets")
    batch = Batch(views=(), indices=targets, targets=targets)
    x = (stored.tensor("inputs").requires_grad_(), stored.tensor("inputs_ema"))
    loss = recipe.loss(x, batch)
    loss.backward()
    hard, soft = (float(stored[f"loss_{part}_{name}"]) for part in "cs")
    assert loss.item() == pytest.approx((1 - soft_ce_weight) * hard + soft_ce_weight * soft, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(x[0].grad, stored.tensor(f"grad_{soft_ce_weight}_{name}"), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(recipe.memory.features, rows)  # not before update
    recipe.update((x[0].detach(), x[1]), batch)
    torch.testing.assert_close(recipe.memory.features, stored.tensor(f"features_after_{name}"), atol=1e-6, rtol=0)


def network(dim=32):
    torch.manual_seed(0)
    return with_width(nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, dim)), dim)


def test_twenty_steps_equal_a_plain_restatement():
    """Two views, softened targets, weighted rows, teacher in training mode; the teacher copies the student at 99.

    In float64: Adam takes rounding in gradients near zero for direction, and twenty steps let it grow.
    """
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, 60, 12, generator=generator, dtype=torch.float64)
    labels = torch.arange(60) % 6
    config = DCCCConfig(tau_w=0.07, smooth=0.3, momentum=0.1)
    recipe, theirs = DCCC(config, Images(60)), network().double()
    recipe.build(network().double())
    teacher = copy.deepcopy(theirs)
    recipe.steps = start = 90
    with torch.no_grad():
        features = F.normalize(copy.deepcopy(theirs).eval()(views[0]), dim=1)
    recipe.begin_epoch(features, labels, epoch=0)
    memory = recipe.memory.double().features.clone()
    trained = [p for p in recipe.parameters() if p.requires_grad]
    optimizers = [torch.optim.Adam(p, lr=3.5e-4, weight_decay=5e-4) for p in (trained, theirs.parameters())]
    assert len(trained) == len(list(theirs.parameters())), "the teacher is not trained"

    for step in range(20):
        drawn = torch.randperm(60, generator=generator)[:24]
        batch = Batch(views=(views[0, drawn], views[1, drawn]), indices=drawn, targets=labels[drawn])
        loss = recipe.loss(x := recipe.forward(batch), batch)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        recipe.update(tuple(part.detach() for part in x), batch)

        unit = F.normalize(theirs(views[0, drawn]), dim=1)
        with torch.no_grad():
            other = F.normalize(teacher(views[1, drawn]), dim=1)
        target = 0.7 * F.one_hot(batch.targets, 6) + 0.3 * (other @ memory.T / 0.05).softmax(dim=1)
        plain = -(target * (unit @ memory.T / 0.05).log_softmax(dim=1)).sum(dim=1).mean()
        optimizers[1].zero_grad()
        plain.backward()
        unit = unit.detach()
        for c in batch.targets.unique():
            own = unit[batch.targets == c]
            weights = (-(own @ memory[c]) / 0.07).softmax(dim=0)
            memory[c] = F.normalize(0.1 * memory[c] + 0.9 * weights @ own, dim=0)
        optimizers[1].step()
        alpha = 0.999 if start + step < 99 else min(1 - 1 / (start + step - 98), 0.999)
        for mean, new in zip(teacher.parameters(), theirs.parameters(), strict=True):
            mean.data.mul_(alpha).add_(new.data, alpha=1 - alpha)

        assert loss.item() == pytest.approx(plain.item(), abs=1e-5), f"step {step}"
        torch.testing.assert_close(recipe.memory.features, memory, atol=1e-5, rtol=0)
    assert recipe.steps == start + 20
    for mine, expected in ((recipe.model, theirs), (recipe.teacher, teacher)):
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_without_a_softened_target_there_is_no_teacher():
    recipe = DCCC(DCCCConfig(smooth=0.0), Images(4))
    recipe.build(network())
    assert list(recipe.ranked()) == ["model"]
    assert len(recipe.views()) == 1


def test_settings_are_the_published_commands():
    market, msmt17 = (DCCCConfig.for_dataset(name) for name in ("market1501", "msmt17"))
    assert (market.eps, market.epochs, market.tau_w, market.smooth, market.seed) == (0.7, 70, 0.03, 0.3, 3407)
    assert (msmt17.eps, msmt17.epochs, msmt17.tau_w, msmt17.smooth, msmt17.seed) == (0.8, 80, 0.6, 0.1, 1)
    assert market.teacher_weight == pytest.approx(0.3)
    assert scheduled_eps(msmt17, 79) == pytest.approx(0.3959, abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"tau_w": 0.0}, "tau_w must be positive"),
        ({"eps_step": 0}, "eps_step must be at least 1"),
        ({"smooth": 1.5}, r"smooth must lie in \[0, 1\], got 1.5"),
        ({"eps_scheduler": "cosine"}, "eps_scheduler must be one of fix, step, linear, expo, log"),
    ],
)
def test_bad_settings_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        DCCCConfig(**setting)


def test_two_epochs_and_a_resumed_counter(smoke):
    run = smoke("dccc", epochs=1)
    run = smoke("dccc", epochs=2, resume=True)
    assert np.isfinite(run.last["loss"])
    assert run.last["network"] in ("model", "teacher")
    from safetensors.torch import load_file

    assert load_file(run.folder / "state.safetensors")["recipe._extra_state"].item() == 6

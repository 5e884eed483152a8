# SPDX-License-Identifier: Apache-2.0
"""SpCL + Cluster Contrast: rows of both domains in one memory, and every choice that its description leaves open."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.labels.self_paced import SelfPacedLabels
from fastreid_u.models.reid import ReIDModel
from fastreid_u.recipe import Batch, Images
from fastreid_u.recipes import get_method, spcl
from fastreid_u.recipes.cluster_contrast_uda import ClusterContrastUDA, ClusterContrastUDAConfig
from fastreid_u.reference.momentum_update import momentum_update_

PEOPLE, IMAGES, WIDTH = 4, 12, 8
LABELS = torch.tensor([0] * 5 + [1] * 5 + [-1, -1])


def unit(*shape, number=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(number)), dim=-1)


def extractor(asked=None, **rows):
    """What the engine hands to ``features``; notes which BatchNorm ran."""

    def extract(network, of="target"):
        if asked is not None:
            asked.append((of, network.bnneck.domain))
        return rows[of]

    return extract


def recipe(**settings):
    torch.manual_seed(0)
    backbone = nn.Linear(WIDTH, WIDTH)
    backbone.num_features = WIDTH
    pids = torch.arange(PEOPLE).repeat_interleave(2)
    config = ClusterContrastUDAConfig(temp=0.1, **settings)
    made = ClusterContrastUDA(config, Images(IMAGES, source=Images(len(pids), pids=pids)))
    made.build(ReIDModel(backbone, nn.Identity(), arch="linear"))
    return made


ROWS = {"target": unit(IMAGES, WIDTH, number=1), "source": unit(2 * PEOPLE, WIDTH, number=2)}


def started(**settings):
    made = recipe(**settings)
    begin(made)
    return made


def begin(made):
    """Targets of a first epoch with ``LABELS``."""
    return made.begin_epoch(made.features(extractor(**ROWS), epoch=0), LABELS, epoch=0)


def step(targets):
    identities = torch.tensor([0, 0, 3, 3])
    source = Batch(views=(), indices=torch.tensor([0, 1, 6, 7]), targets=identities)
    batch = Batch(views=(), indices=torch.arange(4), targets=targets, source=source)
    return batch, unit(4, WIDTH, number=3).requires_grad_(), unit(4, WIDTH, number=4).requires_grad_()


@pytest.mark.parametrize("use_hard", [False, True])
def test_a_step_against_plain_arithmetic(use_hard):
    made = started(use_hard=use_hard, momentum=0.3)
    batch, own, labelled = step(torch.tensor([0, 1, 0, 1]))
    rows = torch.stack(
        [F.normalize(ROWS["source"][2 * p : 2 * p + 2].mean(0), dim=0) for p in range(PEOPLE)]
        + [F.normalize(ROWS["target"][c == LABELS].mean(0), dim=0) for c in (0, 1)]
    )
    torch.testing.assert_close(made.memory.features, rows)
    loss = made.loss((own, labelled), batch)
    loss.backward()
    x, y = own.detach().requires_grad_(), labelled.detach().requires_grad_()
    expected = F.cross_entropy(x @ rows.T / 0.1, batch.targets + PEOPLE)  # a source identity is a negative of a target
    expected = expected + F.cross_entropy(y @ rows.T / 0.1, batch.source.targets)  # cluster, and the other way round
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in ((own, x), (labelled, y)):  # ours comes without the part along the feature
        along = (theirs.grad * theirs.detach()).sum(dim=1, keepdim=True) * theirs.detach()
        torch.testing.assert_close(ours.grad, theirs.grad - along, rtol=1e-4, atol=2e-6)

    made.update((own.detach(), labelled.detach()), batch)
    rule = "hard" if use_hard else "sequential"
    momentum_update_(rows, labelled.detach(), batch.source.targets, momentum=0.3, rule=rule)
    momentum_update_(rows, own.detach(), batch.targets + PEOPLE, momentum=0.3, rule=rule)
    torch.testing.assert_close(made.memory.features, rows, rtol=0, atol=1e-6)


def test_epsilon_bounds_the_loss():
    far = -unit(1, WIDTH, number=9)
    losses = []
    for softmax in ("plain", "epsilon"):
        made = started(softmax=softmax)
        made.memory.temp = 0.02
        made.memory.features.copy_(unit(1, WIDTH, number=9).expand(PEOPLE + 2, -1))
        made.memory.features[PEOPLE:] = far  # the target's own row is opposite to all others
        batch, _, labelled = step(torch.tensor([0, 1, 0, 1]))
        own = -far.expand(4, -1)
        losses.append((made.loss((own, labelled), batch) - made.loss((own * 0, labelled), batch)).item())
    plain, bounded = losses
    assert plain > 90
    assert bounded < 15


def test_source_rows_persist_or_are_made_anew():
    for refresh in ("persist", "every_epoch"):
        made = started(source_refresh=refresh)
        batch, own, labelled = step(torch.tensor([0, 1, 0, 1]))
        made.update((own.detach(), labelled.detach()), batch)
        moved = made.memory.features[:PEOPLE].clone()
        later = {"target": ROWS["target"], "source": unit(2 * PEOPLE, WIDTH, number=7)}
        made.begin_epoch(made.features(extractor(**later), epoch=1), LABELS, epoch=1)
        fresh = torch.stack([F.normalize(later["source"][2 * p : 2 * p + 2].mean(0), dim=0) for p in range(PEOPLE)])
        torch.testing.assert_close(made.memory.features[:PEOPLE], moved if refresh == "persist" else fresh)


@pytest.mark.parametrize("compat", [False, True])
def test_source_features_come_from_the_sources_norms_or_as_in_openunreid(compat):
    asked = []
    made = recipe(compat=compat)
    made.features(extractor(asked, **ROWS), epoch=0)
    made.features(extractor(asked, **ROWS), epoch=1)
    assert asked == [("source", "target" if compat else "source"), ("target", "target"), ("target", "target")]
    assert not made.model.bnneck.source.bias.requires_grad


def test_unclustered_images_sit_out_or_have_a_row_each():
    dropped = started()
    assert torch.equal(begin(dropped), LABELS)
    assert len(dropped.memory.features) == PEOPLE + 2
    kept = started(unclustered="row")
    targets = begin(kept)
    assert targets.tolist() == [0] * 5 + [1] * 5 + [2, 3]
    assert len(kept.memory.features) == PEOPLE + 4
    torch.testing.assert_close(kept.memory.features[-2:], ROWS["target"][-2:])

    holed = {**ROWS, "target": ROWS["target"].clone()}
    holed["target"][10] = torch.nan  # an image that cannot be read
    made = recipe(unclustered="row")
    made.images.readable[10] = False
    targets = made.begin_epoch(made.features(extractor(**holed), epoch=0), LABELS, epoch=0)
    assert targets.tolist() == [0] * 5 + [1] * 5 + [-1, 2]
    assert torch.isfinite(made.memory.features).all()


@pytest.mark.parametrize("reliability", [False, True])
def test_reliability_is_spcls(reliability, clustered):
    features = clustered(120, 16, number=3, spread=1.0)
    made = ClusterContrastUDA(
        ClusterContrastUDAConfig(reliability=reliability, k1=10, k2=4, eps=0.5, eps_gap=0.1),
        Images(120, source=Images(2, pids=torch.tensor([0, 1]))),
    )  # fmt: skip
    labels = made.labels(features, epoch=0)
    plain = fastreid_u.pseudo_labels(features, eps=0.5, k1=10, k2=4)
    trusted = spcl.SpCL(spcl.SpCLConfig(k1=10, k2=4, eps=0.5, eps_gap=0.1), Images(120)).labels(features, epoch=0)
    assert not torch.equal(plain, trusted)
    assert torch.equal(labels, trusted if reliability else plain)
    assert isinstance(made.labels, SelfPacedLabels) == reliability
    assert not reliability or made.labels.threshold is not None


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="source_refresh must be one of persist, every_epoch, got 'never'"):
        ClusterContrastUDAConfig(source_refresh="never")
    with pytest.raises(ValueError, match="eps_gap must keep"):
        ClusterContrastUDAConfig(reliability=True, eps_gap=0.5)
    assert ClusterContrastUDAConfig(eps_gap=0.5).eps_gap == 0.5  # nobody reads it


def test_defaults():
    config = ClusterContrastUDAConfig.for_dataset("msmt17")
    assert (config.batch_size, config.num_instances, config.bn_group, config.iters) == (256, 16, 64, 800)
    assert (config.temp, config.momentum, config.eps, config.pooling_type) == (0.05, 0.1, 0.6, "gem")
    assert (config.source_refresh, config.reliability, config.unclustered, config.softmax) == (
        "persist", False, "drop", "plain",
    )  # fmt: skip
    assert ClusterContrastUDAConfig.for_dataset("market1501").iters == 400
    assert get_method("cluster_contrast_uda") is ClusterContrastUDA
    assert recipe().labels.describe().endswith("min_samples 4")
    assert recipe(reliability=True).labels.describe().endswith("clusters that eps -+ 0.02 agree with")


def test_two_epochs_and_a_crash_between_them(tiny_world, tiny_source, tmp_path, power_cut):
    """Source rows and bar survive: the resumed run ends where the unbroken one does."""
    dataset = load_dataset("market1501", tiny_world)
    small = dict(
        method="cluster_contrast_uda", source=str(tiny_source), height=64, width=32, arch="resnet10", weights=None,
        bn_group=8, batch_size=16, num_instances=4, iters=2, epochs=2, workers=0, k1=8, k2=3, reliability=True,
        eps_gap=0.1, unclustered="row", center_per_camera=True, calibrate_bn=2, eval_step=2, quiet=True, device="cpu",
    )  # fmt: skip
    whole = fastreid_u.train(dataset, logs_dir=tmp_path / "whole", **small)
    assert all(np.isfinite(record["loss"]) and record["clusters"] > 1 for record in whole.records)
    with power_cut(1):
        fastreid_u.train(dataset, logs_dir=tmp_path / "broken", **small)
    resumed = fastreid_u.train(dataset, logs_dir=tmp_path / "broken", resume=True, **small)
    ours, theirs = (load_file(run.folder / "state.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys() >= {"recipe.memory.features", "recipe.labels.bar"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

# SPDX-License-Identifier: Apache-2.0
"""The seams between engine and methods."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastreid_u
from fastreid_u.config import Config
from fastreid_u.labels.generator import center_per_camera
from fastreid_u.recipe import Images, Paper, Recipe, balanced_batches
from fastreid_u.recipes import get_method
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig


def people(ids=8, per_camera=4, cameras=2, shift=0.0, dim=32):
    """Unit features of ``ids`` tight identities, each camera adding its own constant vector."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(ids, dim, generator=generator)
    offsets = shift * torch.randn(cameras, dim, generator=generator)
    pids = torch.arange(ids).repeat_interleave(per_camera * cameras)
    camids = torch.arange(cameras).repeat(ids * per_camera)
    noise = 0.1 * torch.randn(len(pids), dim, generator=generator)
    return F.normalize(centres[pids] + offsets[camids] + noise, dim=1), pids, camids


def test_centring_removes_what_a_camera_adds():
    features, pids, camids = people(shift=3.0)
    config = ClusterContrastConfig(k1=8, k2=3, eps=0.5)
    plain = ClusterContrast(config, Images(len(camids), camids)).labels(features, epoch=0)
    centred_config = ClusterContrastConfig(k1=8, k2=3, eps=0.5, center_per_camera=True)
    centred = ClusterContrast(centred_config, Images(len(camids), camids)).labels(features, epoch=0)
    assert torch.equal(centred, pids)  # one cluster per identity, numbered by first image
    mixed = [len(set(plain[pids == pid].tolist())) for pid in range(8)]
    assert max(mixed) > 1  # without it, cameras split identities


def test_centring_gives_unit_rows_and_leaves_its_input_alone():
    features, _, camids = people()
    before = features.clone()
    centred = center_per_camera(features, camids)
    assert torch.equal(features, before)
    torch.testing.assert_close(centred.norm(dim=1), torch.ones(len(features)))
    for camid in camids.unique():
        own = features[camids == camid]
        torch.testing.assert_close(centred[camids == camid], F.normalize(own - own.mean(0), dim=1))


def test_unreadable_rows_are_unclustered_and_disturb_nobody():
    features, pids, camids = people()
    config = ClusterContrastConfig(k1=8, k2=3)
    holed = torch.cat([features, torch.full((2, features.shape[1]), torch.nan)])
    images = Images(len(holed), torch.cat([camids, torch.tensor([0, 1])]))
    images.readable[-2:] = False
    labels = ClusterContrast(config, images).labels(holed, epoch=0)
    assert torch.equal(labels[:-2], pids)
    assert labels[-2:].tolist() == [-1, -1]


def test_batches_are_of_one_pass_or_as_many_as_asked():
    labels = torch.tensor([0] * 5 + [1] * 5 + [-1] * 3 + [2] * 5)
    one_pass = ClusterContrast(ClusterContrastConfig(iters=0, batch_size=4, num_instances=4), Images(18))
    batches = one_pass.batches(labels, epoch=0)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert not {row for batch in batches for row in batch} & {10, 11, 12}
    steps = ClusterContrast(ClusterContrastConfig(iters=7, batch_size=8, num_instances=4), Images(18))
    assert [len(batch) for batch in steps.batches(labels, epoch=0)] == 7 * [8]
    assert steps.batches(labels, epoch=0) == steps.batches(labels, epoch=0)
    assert steps.batches(labels, epoch=0) != steps.batches(labels, epoch=1)
    assert balanced_batches(Images(18), labels, steps.config, 0, 3) == steps.batches(labels, epoch=0)[:3]  # a source's


def test_cameras_are_used_unless_told_otherwise():
    labels = torch.zeros(40, dtype=torch.int64)
    camids = torch.arange(40) % 2
    with_cameras = ClusterContrast(ClusterContrastConfig(iters=50, batch_size=4, num_instances=4), Images(40, camids))
    groups = np.array(with_cameras.batches(labels, 0)).reshape(-1, 4)
    assert (groups[:, 1:] % 2 != groups[:, :1] % 2).all()
    without = ClusterContrast(
        ClusterContrastConfig(iters=50, batch_size=4, num_instances=4, no_cam=True), Images(40, camids)
    )
    groups = np.array(without.batches(labels, 0)).reshape(-1, 4)
    assert (groups[:, 1:] % 2 == groups[:, :1] % 2).any()


def test_methods_is_a_list_and_a_package():
    import fastreid_u.recipes.cluster_contrast  # binds the package to the name, as any training does

    assert "cluster_contrast" in fastreid_u.methods()
    assert fastreid_u.methods() == sorted(fastreid_u.methods())
    assert get_method("cluster_contrast") is ClusterContrast
    assert get_method(ClusterContrast) is ClusterContrast


@pytest.mark.parametrize("name", fastreid_u.methods())
def test_every_method_is_what_it_is_listed_as_and_documented(name):
    recipe = get_method(name)
    assert recipe.name == name
    assert recipe.paper.title
    for dataset in ("", "market1501", "synthetic"):
        config = recipe.Config.for_dataset(dataset)
        assert all(field.metadata["help"] and field.metadata["source"] for field in dataclasses.fields(config))
    pages = Path(__file__).parents[1] / "docs" / "methods"
    assert f"`{name}`" in (pages / "README.md").read_text()
    assert f"`{name}`" in (pages / f"{name}.md").read_text()


def test_an_unknown_method_lists_the_known():
    with pytest.raises(
        ValueError, match=r"method must be one of .*cluster_contrast.*, got 'cluster_contrst'.*did you mean"
    ):
        get_method("cluster_contrst")


@pytest.mark.parametrize(("count", "group"), [(1, None), (2, "world")])
def test_labels_are_shared_out_where_there_are_several_ranks(monkeypatch, count, group):
    from fastreid_u import ranks
    from fastreid_u.labels import dbscan

    monkeypatch.setattr(ranks, "world_size", lambda: count)
    real, asked = dbscan.pseudo_labels, []

    def alone(*given, group=None, **settings):
        asked.append(group)
        return real(*given, **settings)

    monkeypatch.setattr(dbscan, "pseudo_labels", alone)
    features, _, camids = people()
    for name in ("cluster_contrast", "spcl", "cacl"):
        method = get_method(name)
        method(method.Config(k1=8, k2=3), Images(len(features), camids)).labels.cluster(features, epoch=0)
    assert asked == [group] * 3


def test_a_subclass_is_its_authors_design_unless_it_names_a_paper():
    class Mine(get_method("ice")):
        name = "mine"

    assert (Mine.paper.title, Mine.paper.published) == ("mine", False)
    assert Mine.paper.compat  # the code that it inherits still asks for it
    assert get_method("ice").paper == Paper("ICE", compat=True)


def test_an_author_must_know_fifteen_names():
    """Whatever a recipe offers beyond nn.Module, the attributes that it has once it is built included."""

    class Plain(Recipe):
        name = "plain"

        def begin_epoch(self, features, labels, epoch):
            return labels

        def loss(self, outputs, batch):
            return outputs.sum()

    plain = Plain(Config(), Images(4))
    plain.build(torch.nn.Identity())
    offered = {*dir(Recipe), *Recipe.__annotations__, *vars(plain), *dict(plain.named_children())}
    names = {name for name in offered if not name.startswith("_") and not hasattr(torch.nn.Module(), name)}
    assert len(names) <= 15, sorted(names)

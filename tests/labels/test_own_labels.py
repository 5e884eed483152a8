# SPDX-License-Identifier: Apache-2.0
"""Labels that a clustering of one's own returns: whole numbers of any kind are taken, all else is refused by name."""

import numpy as np
import pytest
import torch

import fastreid_u
from fastreid_u._label_checks import require_clustering
from fastreid_u.config import Config
from fastreid_u.data import load_dataset
from fastreid_u.labels.generator import LabelGenerator
from fastreid_u.recipe import Images
from fastreid_u.recipes.cluster_contrast import ClusterContrast

LABELS = torch.tensor([0, 2, -1, 1, 1, 0, 2, -1])


class Given(LabelGenerator):
    """Returns what it was given."""

    def __init__(self, config, images, made):
        super().__init__(config, images)
        self.made = made

    def cluster(self, features, epoch):
        return self.made

    def describe(self):
        return "given"


def labelled(made, readable=None):
    images = Images(8 if readable is None else len(readable), readable=readable)
    return Given(Config(center_per_camera=False), images, made)(torch.zeros(images.count, 4), 0)


@pytest.mark.parametrize(
    "made",
    [
        LABELS.int(), LABELS.to(torch.int8), LABELS.float(), LABELS.half(), LABELS.double(), LABELS.tolist(),
        tuple(LABELS.tolist()), LABELS.numpy(), LABELS.numpy().astype(np.int32), LABELS.numpy().astype(np.float32),
        LABELS.numpy()[::-1][::-1], torch.where(LABELS < 0, -2, LABELS),
    ],
    ids=[
        "int32", "int8", "float32", "float16", "float64", "list", "tuple", "numpy", "numpy int32", "numpy float32",
        "numpy view", "other negative numbers",
    ],
)  # fmt: skip
def test_whole_numbers_of_any_kind_are_labels(made):
    found = labelled(made)
    assert torch.equal(found, LABELS)
    assert found.dtype == torch.int64


def test_unsigned_numbers_are_labels_too():
    assert torch.equal(labelled(LABELS.clamp(min=0).numpy().astype(np.uint64)), LABELS.clamp(min=0))


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        (LABELS[:5], r"must have one entry for each image \(8\), got 5"),
        (torch.cat([LABELS, LABELS]), r"must have one entry for each image \(8\), got 16"),
        (LABELS[:, None], r"must be 1-D, got shape \(8, 1\)"),
        (LABELS + 0.5, "must be whole numbers, got 0.5"),
        (torch.full((8,), torch.nan), "must be whole numbers, got nan"),
        (torch.full((8,), torch.inf), "must be below 100080 for 8 images, got"),
        (torch.where(LABELS < 0, 2**31 - 1, LABELS), "must be below 100080 for 8 images, got 2147483647"),
        (torch.where(LABELS < 0, 2**31 - 1, LABELS).numpy(), "must be below 100080 for 8 images, got 2147483647"),
        (LABELS >= 0, "must hold integers, got torch.bool"),
        (["a"] * 8, "must hold numbers"),
        (None, "must be a tensor or an array"),
        ({0: 1}, "must be a tensor or an array"),
    ],
    ids=[
        "too few", "too many", "a column", "fractions", "NaN", "infinity", "noise as the largest int32",
        "the same of NumPy", "bool", "text", "nothing", "a dict",
    ],
)  # fmt: skip
def test_what_cannot_be_labels_is_refused_by_name(made, rule):
    with pytest.raises((TypeError, ValueError), match=f"train: labels of Given.cluster {rule}"):
        labelled(made)


def test_labels_are_those_of_the_readable_images_alone():
    readable = torch.tensor([True] * 4 + [False] + [True] * 4)
    assert labelled(LABELS.tolist(), readable).tolist() == [0, 2, -1, 1, -1, 1, 0, 2, -1]


def test_no_images_have_no_labels():
    assert require_clustering("train", "labels", [], 0).dtype == torch.int64


class Own(ClusterContrast):
    """Labels without a generator, and targets of another kind."""

    name = "own_labels"
    change = staticmethod(lambda labels: labels)
    aim = staticmethod(lambda targets: targets)

    def __init__(self, config, images):
        super().__init__(config, images)
        inner = self.labels
        self.labels.forward = lambda features, epoch: type(self).change(LabelGenerator.forward(inner, features, epoch))

    def begin_epoch(self, features, labels, epoch):
        return type(self).aim(super().begin_epoch(features, labels, epoch))


SMALL = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=1,
    epochs=1, workers=0, k1=8, k2=3, calibrate_bn=2, eval_step=2, quiet=True, device="cpu",
)  # fmt: skip


def train(world, folder, **changes):
    method = type("Changed", (Own,), {name: staticmethod(change) for name, change in changes.items()})
    return fastreid_u.train(load_dataset("market1501", world), method=method, logs_dir=folder, **SMALL)


def test_a_generator_that_overrides_all_is_held_to_the_same(tiny_world, tmp_path):
    own = train(tiny_world, tmp_path, change=lambda labels: labels.int().numpy(), aim=lambda targets: targets.int())
    assert own.last["clusters"] > 1


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"change": lambda labels: labels[1:]}, r"train: labels of 'own_labels' must have one entry for each image"),
        ({"aim": lambda targets: targets[1:]}, r"targets of begin_epoch of 'own_labels' must have one entry for each"),
        ({"aim": lambda targets: targets.float()}, r"targets of begin_epoch of 'own_labels' must hold integers"),
        ({"aim": lambda targets: targets.tolist()}, r"begin_epoch of 'own_labels' must return \(N,\) targets, got \["),
    ],
    ids=["labels", "targets", "fractions", "a list"],
)
def test_what_the_engine_cannot_train_towards_is_refused_by_name(tiny_world, tmp_path, changes, rule):
    with pytest.raises((TypeError, ValueError), match=rule):
        train(tiny_world, tmp_path, **changes)

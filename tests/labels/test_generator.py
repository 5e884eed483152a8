# SPDX-License-Identifier: Apache-2.0
"""A label generator of one's own is one file, and is asked for everything that the engine knows of labels."""

import json

import pytest
import torch

import fastreid_u
from fastreid_u.config import Config
from fastreid_u.data import load_dataset
from fastreid_u.engine.loop import NoClustersError
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.recipe import Images
from fastreid_u.recipes import get_method

OWN_FILE = '''
import torch

from fastreid_u.labels.generator import Advice, LabelGenerator
from fastreid_u.recipes.cluster_contrast import ClusterContrast


class NearestCentre(LabelGenerator):
    """The nearest of the first epoch's chosen rows, which are kept."""

    advice = Advice("Choose other centres", one_cluster="Choose more centres")

    def __init__(self, config, images, count):
        super().__init__(config, images)
        self.register_buffer("centres", torch.zeros(count, 256))

    def cluster(self, features, epoch):
        if not len(self.centres):
            return torch.full((len(features),), -1)
        if epoch == 0:
            self.centres.copy_(features[:: len(features) // len(self.centres)][: len(self.centres)])
        return (features @ self.centres.T).argmax(dim=1).unique(return_inverse=True)[1]

    def describe(self):
        return f"the nearest of {len(self.centres)} centres"


class Centred(ClusterContrast):
    name, centres = "centred", 5

    def __init__(self, config, images):
        super().__init__(config, images)
        self.labels = NearestCentre(config, images, self.centres)
'''
TINY = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=2,
    epochs=2, workers=0, calibrate_bn=2, eval_step=2, quiet=True, device="cpu",
)  # fmt: skip


@pytest.fixture
def centred(tmp_path):
    file = tmp_path / "centred.py"
    file.write_text(OWN_FILE)
    return get_method(f"{file}:Centred")


def test_a_generator_in_a_file_of_its_own_trains_and_resumes(centred, tiny_world, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    whole = fastreid_u.train(dataset, method=centred, logs_dir=tmp_path / "whole", **TINY)
    assert all(1 < record["clusters"] <= 5 for record in whole.records)
    assert "labels      the nearest of 5 centres, per-camera" in (whole.folder / "log.txt").read_text()
    fastreid_u.train(dataset, method=centred, logs_dir=tmp_path / "parts", **TINY | {"epochs": 1})
    parts = fastreid_u.train(dataset, method=centred, logs_dir=tmp_path / "parts", resume=True, **TINY)
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]
        for text in ((run.folder / "metrics.jsonl").read_text() for run in (whole, parts))
    ]
    assert lines[0][-1] == lines[1][-1]


def test_its_advice_is_given(centred, tiny_world, tmp_path):
    dataset = load_dataset("market1501", tiny_world)
    centred.centres = 0
    with pytest.raises(NoClustersError, match=r"un-clustered at the nearest of 0 centres\. Choose other centres, in"):
        fastreid_u.train(dataset, method=centred, logs_dir=tmp_path / "none", **TINY)
    centred.centres = 1
    run = fastreid_u.train(dataset, method=centred, logs_dir=tmp_path / "one", **TINY | {"epochs": 1})
    assert "Choose more centres (now the nearest of 1 centres)" in (run.folder / "log.txt").read_text()


def test_dbscans_radius_may_follow_a_schedule(clustered):
    features = clustered(90, 16, number=3, spread=1.0)
    config = Config(k1=10, k2=4, eps=0.5)
    falling = DBSCANLabels(config, Images(90), lambda epoch: 0.5 - 0.1 * epoch)
    for epoch in (0, 2):
        eps = 0.5 - 0.1 * epoch
        assert torch.equal(falling(features, epoch), fastreid_u.pseudo_labels(features, eps=eps, k1=10, k2=4))
        assert falling.settings(epoch) == f"eps {eps}, min_samples 4, k1 10"
    assert DBSCANLabels(config, Images(90)).eps(7) == 0.5

# SPDX-License-Identifier: Apache-2.0
"""What the training and the evaluation take from a data set: cameras of its own part."""

import dataclasses
import io

import pytest
import torch

import fastreid_u
from fastreid_u.data import ReIDDataset, Sample, load_dataset
from fastreid_u.engine.datasets import Datasets
from fastreid_u.engine.device import Machine
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import test_split as split_of
from fastreid_u.engine.session import open_session
from fastreid_u.recipes.cluster_contrast import ClusterContrast


@pytest.fixture
def dataset(tiny_world):
    return load_dataset("market1501", tiny_world)


def of_camera(samples, camid):
    return tuple(sample._replace(camid=camid) for sample in samples)


def described(dataset):
    return Datasets(dataset, None, "").images()


class TestCamerasOfThePart:
    def test_training_takes_those_of_training(self, dataset):
        assert described(dataset).camids.unique().tolist() == [0, 1, 2]
        assert described(dataclasses.replace(dataset, train=of_camera(dataset.train, 2))).camids is None
        assert described(dataclasses.replace(dataset, query=(), gallery=())).camids is not None

    @pytest.mark.parametrize(
        "method", ["cap", "ice", "pplr_camera", "cap_cluster_contrast", "cap_cluster_contrast_proxy"]
    )
    def test_methods_that_need_two_cameras_count_those_of_training(self, dataset, tmp_path, method):
        single = dataclasses.replace(dataset, train=of_camera(dataset.train, 2))
        with pytest.raises(ValueError, match=f"method '{method}' needs images of two cameras or more"):
            fastreid_u.train(single, method=method, logs_dir=tmp_path / "run", device="cpu", quiet=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("camid", [None, 2])
    def test_centring_per_camera_counts_those_of_training(self, dataset, camid):
        if camid is not None:
            dataset = dataclasses.replace(dataset, train=of_camera(dataset.train, camid))
        shown = io.StringIO()
        machine = Machine(torch.device("cpu"), False, Display(stream=shown))
        recipe = ClusterContrast(ClusterContrast.Config(center_per_camera=True, workers=0), described(dataset))
        open_session(recipe, Datasets(dataset, None, ""), machine, None).close()
        assert ("warning: center_per_camera has no effect" in shown.getvalue()) is (camid is not None)

    @pytest.mark.parametrize(
        ("train", "test", "filtered"), [(None, None, True), (2, None, True), (None, 1, False), (0, 1, False)]
    )
    def test_the_evaluation_takes_those_of_query_and_gallery(self, dataset, train, test, filtered):
        parts = {"train": train, "query": test, "gallery": test}
        parts = {name: of_camera(getattr(dataset, name), camid) for name, camid in parts.items() if camid is not None}
        shown = io.StringIO()
        split = split_of(dataclasses.replace(dataset, **parts), Display(stream=shown))
        assert split.has_cameras is filtered
        assert ("warning: no camera ids for all of query and gallery" in shown.getvalue()) is not filtered

    def test_a_query_without_a_gallery_is_remarked(self):
        one = (Sample("/a.jpg", 0, 0),)
        for part, missing in (("query", "gallery"), ("gallery", "query")):
            shown = io.StringIO()
            assert split_of(ReIDDataset("x", "/", one, **{part: one}), Display(stream=shown)).queries is None
            assert f"warning: {part} images but no {missing}: they are not ranked" in shown.getvalue()


def test_a_set_without_training_images_is_for_evaluation(plant, tmp_path):
    folder = plant("crops", "query/1/a.jpg", "query/2/a.jpg", "gallery/1/b.jpg", "gallery/2/b.jpg")
    with pytest.raises(ValueError, match="train: dataset must hold training images, got none in"):
        fastreid_u.train(folder, logs_dir=tmp_path / "run", device="cpu", quiet=True)

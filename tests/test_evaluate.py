# SPDX-License-Identifier: Apache-2.0
"""Evaluation of data that are less than a query and a gallery with cameras: an answer and a warning, never a crash."""

import dataclasses
import io
import math

import pytest
import torch

import fastreid_u
from fastreid_u.data import ReIDDataset, Sample, load_dataset
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import Split, evaluate_split
from fastreid_u.engine.evaluate import test_split as split_of
from fastreid_u.engine.extract import BadImageLog
from fastreid_u.engine.loop import NoClustersError

SETTINGS = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, workers=0, iters=1, epochs=1, batch_size=16,
    num_instances=4, k1=8, k2=3, device="cpu",
)  # fmt: skip


@pytest.fixture
def dataset(tiny_world):
    return load_dataset("market1501", tiny_world)


def trained(dataset, folder):
    run = fastreid_u.train(dataset, logs_dir=folder, **SETTINGS)
    return run, (run.folder / "log.txt").read_text()


def test_the_card_says_what_the_best_model_is_best_on(dataset, tmp_path):
    _, log = trained(dataset, tmp_path / "a")
    assert "model_best is chosen on the test split, as published" in log
    run = fastreid_u.train(dataset, method="cap", logs_dir=tmp_path / "b", **SETTINGS | {"num_instances": 2})
    assert "chosen on the test split; published: the last epoch" in (run.folder / "log.txt").read_text()


def test_without_cameras(dataset, tmp_path):
    blind = dataclasses.replace(dataset, has_cameras=False)
    run, log = trained(blind, tmp_path)
    assert 0 < run.last["mAP"] <= 1
    assert run.last["queries"] == len(dataset.query)
    assert "warning: no camera ids" in log


def test_without_a_query_split_known_identities_are_ranked_against_each_other(dataset, tmp_path):
    run, log = trained(dataclasses.replace(dataset, query=(), gallery=()), tmp_path)
    assert 0 < run.last["mAP"] <= 1
    assert run.last["queries"] == len(dataset.train)
    assert "which flatters the network" in log
    assert "model_best is chosen on the training images themselves\n" in log
    assert "at epoch 0, on the training images themselves" in log


def test_without_query_split_and_identities_nothing_is_evaluated(dataset, tmp_path):
    nameless = tuple(sample._replace(pid=-1) for sample in dataset.train)
    run, log = trained(dataclasses.replace(dataset, train=nameless, query=(), gallery=(), has_pids=False), tmp_path)
    assert "mAP" not in run.last
    assert run.last["ari"] is None
    assert run.best is None
    assert "nothing to evaluate" in log
    assert "no model_best" in log


def ranked(features, pids, camids, queries, has_cameras=True, ap="rank"):
    """Figures of given features, through a stand-in network and loader."""

    class Loader:
        def epoch(self, order):
            from fastreid_u.data.loader import Batch

            yield Batch(features, torch.arange(len(features)), [])

    samples = tuple(Sample(f"{i}.jpg", pid, cam) for i, (pid, cam) in enumerate(zip(pids, camids, strict=True)))
    display = Display(quiet=True)
    return evaluate_split(
        torch.nn.Identity(), Loader(), Split(samples, queries, has_cameras), ap=ap,
        display=display, log=BadImageLog(len(samples), display), device=torch.device("cpu"),
    )  # fmt: skip


def test_a_case_worked_by_hand():
    """One query; gallery by distance: same camera (left out), wrong, right, right."""
    features = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.4]])
    figures = ranked(features, [1, 1, 2, 1, 1], [0, 0, 1, 1, 2], queries=1)
    assert figures["mAP"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (figures["top1"], figures["top5"]) == (0.0, 1.0)
    assert figures["mINP"] == pytest.approx(2 / 3)
    blind = ranked(features, [1, 1, 2, 1, 1], [0, 0, 1, 1, 2], queries=1, has_cameras=False)
    assert blind["mAP"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    trapezoid = ranked(features, [1, 1, 2, 1, 1], [0, 0, 1, 1, 2], queries=1, ap="trapezoid")
    assert trapezoid["mAP"] == pytest.approx(((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2, abs=0.26)
    assert trapezoid["mAP"] != pytest.approx(figures["mAP"])


def test_an_image_is_never_its_own_match():
    features = torch.tensor([[0.0], [5.0], [1.0], [6.0]])
    figures = ranked(features, [1, 2, 1, 2], [0, 0, 0, 0], queries=None, has_cameras=False)
    assert figures["queries"] == 4
    assert figures["mAP"] == 1.0
    same_camera = ranked(features, [1, 2, 1, 2], [0, 0, 0, 0], queries=None, has_cameras=True)
    assert same_camera["queries"] == 0
    assert math.isnan(same_camera["mAP"])


def test_split_prefers_query_and_gallery(dataset):
    display = Display(stream=io.StringIO())
    assert split_of(dataset, display).queries == len(dataset.query)
    assert display.stream.getvalue() == ""


def test_no_images_and_one_image(dataset, tmp_path):
    empty = ReIDDataset(name="empty", root=tmp_path, train=(), query=(), gallery=())
    with pytest.raises(ValueError, match="dataset must hold training images, got none"):
        fastreid_u.train(empty, logs_dir=tmp_path / "a", **SETTINGS)
    assert not (tmp_path / "a").exists()
    alone = dataclasses.replace(dataset, train=dataset.train[:1], query=(), gallery=(), has_pids=False)
    with pytest.raises(NoClustersError, match="all 1 images are un-clustered"):
        fastreid_u.train(alone, logs_dir=tmp_path / "b", quiet=True, **SETTINGS)


def test_queries_without_a_match_in_another_camera_are_said_not_crashed_on(dataset, tmp_path):
    first = tuple(sample for sample in dataset.gallery if sample.camid == 0)
    query = tuple(sample for sample in dataset.query if sample.camid == 0)
    run, log = trained(dataclasses.replace(dataset, query=query, gallery=first), tmp_path)
    assert "mAP" not in run.last
    assert run.best is None
    assert "camera" in log[log.index("warning: ") :]


def test_evaluate_refuses_what_it_cannot_rank(dataset, tmp_path):
    run, _ = trained(dataset, tmp_path)
    nothing = dataclasses.replace(dataset, query=(), gallery=(), has_pids=False)
    with pytest.raises(ValueError, match="must have a query/gallery split or known identities"):
        fastreid_u.evaluate(run.folder, nothing, device="cpu", workers=0, quiet=True)

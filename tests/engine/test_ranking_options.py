# SPDX-License-Identifier: Apache-2.0
"""How trained networks are ranked when asked for: re-ranked, or within the query's own camera too."""

import dataclasses

import pytest
import torch

import fastreid_u
from fastreid_u.cli import main
from fastreid_u.config import Config
from fastreid_u.data import load_dataset

SETTINGS = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, workers=0, iters=1, epochs=1, batch_size=16,
    num_instances=4, k1=8, k2=3, device="cpu",
)  # fmt: skip
STYLES = ("openreid", "zhong", "clustering")

pytestmark = pytest.mark.filterwarnings("ignore:rerank. k1=20")  # the world is that small


@pytest.fixture(scope="module")
def dataset(tiny_world):
    return load_dataset("market1501", tiny_world)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    return fastreid_u.train(dataset, logs_dir=tmp_path_factory.mktemp("run") / "run", quiet=True, **SETTINGS)


def features_and_ids(run, dataset):
    both = dataset.query + dataset.gallery
    x = fastreid_u.extract(run.folder, [sample.path for sample in both], device="cpu", workers=0).features
    ids = [torch.tensor([part[i] for part in both]) for i in (1, 2)]
    queries = len(dataset.query)
    return x[:queries], x[queries:], *(part for each in ids for part in (each[:queries], each[queries:]))


def test_evaluate_re_ranks_by_the_rule_that_is_asked_for(run, dataset, capsys):
    query, gallery, q_pids, g_pids, q_cameras, g_cameras = features_and_ids(run, dataset)
    for style in STYLES:
        found = fastreid_u.evaluate(run.folder, dataset, rerank=style, device="cpu", workers=0)
        assert f"re-ranked, style {style}: k1 20, k2 6, lambda 0.3" in capsys.readouterr().out
        distance = fastreid_u.rerank(query, gallery, style=style)
        expected = fastreid_u.rank_metrics(None, None, q_pids, g_pids, q_cameras, g_cameras, distmat=distance)
        assert found["mAP"] == pytest.approx(expected.mAP, abs=1e-3), style
        assert found["queries"] == expected.num_valid_queries
    assert fastreid_u.evaluate(run.folder, dataset, device="cpu", workers=0)["mAP"] == run.last["mAP"]
    assert "re-ranked" not in capsys.readouterr().out


def test_what_cannot_be_re_ranked_is_refused(run, dataset):
    with pytest.raises(
        ValueError, match="evaluate: rerank must be one of 'openreid', 'zhong', 'clustering', got 'yes'"
    ):
        fastreid_u.evaluate(run.folder, dataset, rerank="yes", device="cpu")
    alone = dataclasses.replace(dataset, query=(), gallery=())
    with pytest.raises(ValueError, match="evaluate: dataset must have a query/gallery split to be re-ranked, got"):
        fastreid_u.evaluate(run.folder, alone, rerank="zhong", device="cpu", quiet=True)


def test_the_command_has_both_switches(run, tiny_world, capsys):
    words = ["evaluate", str(run.folder), "market1501", "--data-dir", str(tiny_world), "--device", "cpu"]
    main([*words, "--rerank", "clustering", "--ignore-cameras"])
    printed = capsys.readouterr().out
    assert "re-ranked, style clustering" in printed
    assert "note: cameras are ignored in the ranking" in printed
    main([*words, "--no-ignore-cameras"])
    assert "note" not in capsys.readouterr().out


def own_cameras(dataset):
    """The same images, each person in one camera, as where each video is a camera and has people of its own."""
    splits = {
        name: tuple(sample._replace(camid=sample.pid % 3) for sample in getattr(dataset, name))
        for name in ("query", "gallery")
    }
    return dataclasses.replace(dataset, **splits)


def test_people_of_one_camera_each_are_ranked_where_cameras_are_ignored(run, dataset, tmp_path):
    tracks = own_cameras(dataset)
    given = dict(device="cpu", workers=0, quiet=True)
    with (
        pytest.warns(UserWarning, match=r"without camera ids \(ignore_cameras of train and evaluate\) none would be"),
        pytest.raises(
            ValueError, match=r"a query with a match in another camera, got none in .*; ignore_cameras ranks"
        ),
    ):
        fastreid_u.evaluate(run.folder, tracks, **given)
    found = fastreid_u.evaluate(run.folder, tracks, ignore_cameras=True, **given)
    blind = fastreid_u.evaluate(run.folder, dataclasses.replace(tracks, has_cameras=False), **given)
    assert found == blind
    assert found["queries"] == len(dataset.query)

    trained = fastreid_u.train(tracks, logs_dir=tmp_path / "run", ignore_cameras=True, **SETTINGS)
    assert trained.last["queries"] == len(dataset.query)
    log = (trained.folder / "log.txt").read_text()
    assert "note: cameras are ignored in the ranking" in log
    assert "ignore_cameras  True" in log
    again = fastreid_u.evaluate(trained.folder, tracks, **given)
    assert again["mAP"] == trained.last["mAP"], "as the run did"
    assert fastreid_u.evaluate(trained.folder, dataset, ignore_cameras=False, **given) != again


def test_a_run_of_before_the_switch_is_resumed_and_evaluated(tiny_world, tmp_path, monkeypatch):
    told = Config.to_dict
    with monkeypatch.context() as before:
        before.setattr(
            Config, "to_dict", lambda config: {k: v for k, v in told(config).items() if k != "ignore_cameras"}
        )
        run = fastreid_u.train("market1501", root=tiny_world, logs_dir=tmp_path / "run", quiet=True, **SETTINGS)
    assert "ignore_cameras" not in (run.folder / "config.toml").read_text()
    assert fastreid_u.evaluate(run.folder, device="cpu", workers=0, quiet=True)["mAP"] == run.last["mAP"]
    again = fastreid_u.train(logs_dir=run.folder, resume=True, epochs=2, device="cpu", quiet=True)
    assert (len(again.records), again.config.ignore_cameras) == (2, False)

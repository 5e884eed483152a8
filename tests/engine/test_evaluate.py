# SPDX-License-Identifier: Apache-2.0
"""Evaluation of data that are less than a query and a gallery with cameras: an answer and a warning, never a crash."""

import dataclasses
import io
import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

import fastreid_u
from fastreid_u._toml import dump_toml, load_toml
from fastreid_u.data import ReIDDataset, Sample, load_dataset
from fastreid_u.data import test_transform as transform
from fastreid_u.engine import checkpoint
from fastreid_u.engine.device import Machine
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import Split, SplitImages, evaluate_split
from fastreid_u.engine.evaluate import test_split as split_of
from fastreid_u.engine.image_set import Reading
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
        def __iter__(self):
            from fastreid_u.data.loader import Loaded

            yield Loaded(features, torch.arange(len(features)), [])

    samples = tuple(Sample(f"{i}.jpg", pid, cam) for i, (pid, cam) in enumerate(zip(pids, camids, strict=True)))
    machine = Machine(torch.device("cpu"), False, Display(quiet=True))
    images = SplitImages(Split(samples, queries, has_cameras), Reading(transform(8, 4), batch_size=8), machine)
    images.plain = Loader()
    return evaluate_split(torch.nn.Identity(), images, ap)


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
    assert figures["queries"] >= 2
    assert figures["mAP"] == 1.0
    with pytest.warns(UserWarning, match="none of 4 queries can be scored, the metrics are NaN"):
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
    with (
        pytest.warns(UserWarning, match="k1=8, k2=3 is more than the 1 rows there are"),
        pytest.raises(NoClustersError, match="all 1 images are un-clustered"),
    ):
        fastreid_u.train(alone, logs_dir=tmp_path / "b", quiet=True, **SETTINGS)


def test_queries_without_a_match_in_another_camera_are_said_not_crashed_on(dataset, tmp_path):
    query = next(sample for sample in dataset.query if sample.camid == 0)
    gallery = tuple(sample for sample in dataset.gallery if sample.camid == 0 or sample.pid != query.pid)
    run, log = trained(dataclasses.replace(dataset, query=(query,), gallery=gallery), tmp_path)
    assert "mAP" not in run.last
    assert run.best is None
    assert "camera" in log[log.index("warning: ") :]


def test_evaluate_refuses_what_it_cannot_rank(dataset, tmp_path):
    run, _ = trained(dataset, tmp_path)
    nothing = dataclasses.replace(dataset, query=(), gallery=(), has_pids=False)
    with pytest.raises(ValueError, match="must have a query/gallery split or known identities"):
        fastreid_u.evaluate(run.folder, nothing, device="cpu", workers=0, quiet=True)


# A trained network put to use: evaluated on its own set, in its own precision; features of any images.


@pytest.fixture(scope="module")
def own(tiny_world, tmp_path_factory):
    """A run in every setting that moves the figures' last bits; the set was named, and lies under ``root``."""
    folder = tmp_path_factory.mktemp("own") / "run"
    given = dict(root=tiny_world, amp="bf16", channels_last=True, eval_batch_size=7, ap="sklearn", quiet=True)
    return fastreid_u.train("market1501", logs_dir=folder, **SETTINGS | given)


def retold(run, folder, data=(), **told):
    """A copy of a run folder whose config.toml says ``told`` in its [run] table and ``data`` in [data]."""
    shutil.copytree(run.folder, folder)
    tables = load_toml((folder / "config.toml").read_text())
    tables["run"] |= told
    tables["data"] = dict(data)
    (folder / "config.toml").write_text(dump_toml(tables))
    return folder


def test_a_run_is_evaluated_on_its_own_data_with_the_figures_of_training(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no ./data here, and none is named
    monkeypatch.delenv("FASTREID_U_DATA", raising=False)
    metrics = fastreid_u.evaluate(own.folder, device="cpu", workers=0, quiet=True)
    assert metrics == {name: own.last[name] for name in metrics}, "to the last bit"
    monkeypatch.setenv("HOME", str(own.folder.parent))
    assert fastreid_u.evaluate("~/run/model_best.safetensors", device="cpu", workers=0, quiet=True) == metrics


def test_a_rendered_set_is_found_by_the_dials_of_the_run(own, tmp_path, monkeypatch):
    from fastreid_u.data.synthetic import SyntheticConfig, generate

    dials = dict(train_ids=2, test_ids=2, cameras=2, images_per_camera=2, distractors=0, height=64, width=32)
    world = generate(SyntheticConfig(**dials), tmp_path, workers=1)
    folder = retold(own, tmp_path / "run", dials, dataset="synthetic", root=str(world))
    monkeypatch.setattr("fastreid_u.data.synthetic.write.make_plan", None)  # rendering anew would need it
    assert fastreid_u.evaluate(folder, device="cpu", workers=0, quiet=True)["queries"] >= 2


def test_a_set_that_is_not_known_must_be_named(own, tmp_path):
    nameless = retold(own, tmp_path / "nameless", dataset="")
    own_name = retold(own, tmp_path / "own name", dataset="crops")
    alone = shutil.copy(own.folder / "model_last.safetensors", tmp_path / "alone.safetensors")
    for run in (nameless, own_name, alone):
        with pytest.raises(ValueError, match=r"evaluate: dataset must be given for .*, got none for"):
            fastreid_u.evaluate(run, device="cpu", quiet=True)
    moved = retold(own, tmp_path / "moved", dataset=str(tmp_path / "gone"), root=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"name must be one of .* existing folder"):
        fastreid_u.evaluate(moved, device="cpu", quiet=True)
    with pytest.raises(ValueError, match=r"root must be left out for the run's own folder .*gone, got /here; name the"):
        fastreid_u.evaluate(moved, root="/here", device="cpu", quiet=True)


def header(about):
    return lambda folder: checkpoint.write_tensors(folder / "model_last.safetensors", {}, {"fastreid_u": about})


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (header('{"config": {"arch": "resnet10"}}'), "must describe its network in its header, got no pooling_type, "),
        (header("[]"), "must describe its network in its header, got no arch, "),
        (header("{"), "must be described by JSON in its header, got "),
        (lambda folder: (folder / "config.toml").write_text("[config]\n"), "as train wrote it, got no data, dataset"),
        (lambda folder: (folder / "config.toml").write_text("a ="), "must be as train wrote it, got Invalid value"),
    ],
)
def test_a_damaged_run_is_named(own, tmp_path, tamper, message):
    folder = shutil.copytree(own.folder, tmp_path / "run")
    tamper(folder)
    with pytest.raises(ValueError, match=message):
        fastreid_u.evaluate(folder, device="cpu", quiet=True)


def test_weights_of_another_network_are_refused(own, tmp_path):
    folder = shutil.copytree(own.folder, tmp_path / "run")
    _, about = checkpoint.read_described(folder / "model_last.safetensors")
    header(json.dumps(about))(folder)
    with pytest.raises(ValueError, match="must hold the weights of resnet10, got "):
        fastreid_u.load_model(folder)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda run: fastreid_u.evaluate(run, device="foo"), ValueError, "evaluate: device must be .*, got 'foo'"),
        (lambda run: fastreid_u.extract(run, "x", device="foo"), ValueError, "extract: device must be .*, got 'foo'"),
        (lambda run: fastreid_u.evaluate(run, data="seed=1"), TypeError, "evaluate: data must be .*, got 'seed=1'"),
        (lambda run: fastreid_u.evaluate(run, 5), TypeError, "name must be a name or a path, got 5"),
        (lambda run: fastreid_u.evaluate(None), TypeError, "run must be a path, got None"),
        (lambda run: fastreid_u.extract(run, None), TypeError, "images must be .*, got None"),
        (lambda run: fastreid_u.extract(run, []), ValueError, "images must name at least one file, got none"),
    ],
)
def test_mistakes_are_named(own, call, error, message):
    with pytest.raises(error, match=message):
        call(own.folder)


def test_data_without_a_match_are_an_error_here(own, dataset, capsys):
    query = next(sample for sample in dataset.query if sample.camid == 0)
    gallery = tuple(sample for sample in dataset.gallery if sample.camid == 0 or sample.pid != query.pid)
    lonely = dataclasses.replace(dataset, query=(query,), gallery=gallery)
    with pytest.raises(ValueError, match="evaluate: dataset must hold a query with a match in another camera, got"):
        fastreid_u.evaluate(own.folder, lonely, device="cpu", workers=0)
    assert "warning: " in capsys.readouterr().out


def test_extract_reads_what_a_list_reads_and_counts_the_rest(own, plant, capsys):
    folder = plant("crops", "a.jfif", "b.jpe", "c.gif", "d.JPG", "e.avif", "f.txt")
    result = fastreid_u.extract(own.folder, folder, device="cpu", workers=0, quiet=False)
    assert [Path(path).name for path in result.paths] == ["a.jfif", "b.jpe", "c.gif", "d.JPG"]
    assert not result.bad
    assert "note: folder: 1 files left out, of types that are not read: 1 .avif" in capsys.readouterr().out
    assert len(fastreid_u.extract(own.folder, folder / "a.jfif", device="cpu", workers=0).paths) == 1


def test_extract_takes_every_image_below_a_folder(own, plant, tmp_path):
    folder = plant("cls", "bus/1.jpg", "car/1.jpg", "train/1.jpg", "query/no label.jpg", "2.jpg")
    result = fastreid_u.extract(own.folder, folder, device="cpu", workers=0)
    below = ["2.jpg", "bus/1.jpg", "car/1.jpg", "query/no label.jpg", "train/1.jpg"]
    assert [str(Path(path).relative_to(folder)) for path in result.paths] == below
    assert fastreid_u.extract(own.folder, folder / "2.jpg", device="cpu", workers=0).paths == [str(folder / "2.jpg")]
    (tmp_path / "list.csv").write_text(
        "path,pid,split\ncls/2.jpg,1,gallery\ncls/bus/1.jpg,,train\ncls/car/1.jpg,1,query\n"
    )
    listed = fastreid_u.extract(own.folder, tmp_path / "list.csv", device="cpu", workers=0).paths
    assert [str(Path(path).relative_to(folder)) for path in listed] == ["bus/1.jpg", "car/1.jpg", "2.jpg"]


def test_extract_goes_on_whatever_share_is_unreadable(own, plant):
    folder = plant("crops", "a.jpg", "b.jpg")
    (folder / "a.jpg").write_bytes(b"")
    result = fastreid_u.extract(own.folder, folder, device="cpu", workers=0)
    assert list(result.bad) == [str(folder / "a.jpg")]
    assert torch.isfinite(result.features).all(dim=1).tolist() == [False, True]
    (folder / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images must hold one that can be read, got 2 that cannot, .*a.jpg: empty"):
        fastreid_u.extract(own.folder, folder, device="cpu", workers=0)


def test_torch_s_global_modes_do_not_matter(own, plant):
    folder = plant("crops", "a.jpg", "b.jpg")

    def result():
        metrics = fastreid_u.evaluate(own.folder, device="cpu", workers=0, quiet=True)
        return metrics, fastreid_u.extract(own.folder, folder, device="cpu", workers=0).features

    metrics, features = result()
    with torch.inference_mode():
        assert result()[0] == metrics
        model, _ = fastreid_u.load_model(own.folder)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    torch.set_default_dtype(torch.float64)
    try:
        again = result()
        assert again[0] == metrics
        assert torch.equal(again[1], features)
        assert again[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_worker_outlives_a_failure(own, dataset, monkeypatch):
    import fastreid_u.trained.evaluate as module

    before = set(multiprocessing.active_children())

    def fails(model, images, ap):
        next(images.plain.epoch())
        assert set(multiprocessing.active_children()) > before
        raise RuntimeError("diverged")

    monkeypatch.setattr(module, "evaluate_split", fails)
    with pytest.raises(RuntimeError, match="diverged") as kept:  # ``kept`` holds the frames, as a notebook does
        fastreid_u.evaluate(own.folder, dataset, device="cpu", workers=1)
    assert set(multiprocessing.active_children()) == before, kept

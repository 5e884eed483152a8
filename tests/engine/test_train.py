# SPDX-License-Identifier: Apache-2.0
"""The whole loop on a tiny rendered world: what it leaves on disk, that it repeats, that it goes on after a crash."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastreid_u
from fastreid_u._toml import load_toml
from fastreid_u.engine import checkpoint, loop, optimizer
from fastreid_u.engine.folder import RunFolder

TINY = dict(
    method="cluster_contrast", height=64, width=32, batch_size=16, num_instances=4, iters=3, epochs=2, workers=0,
    k1=8, k2=3, calibrate_bn=2, step_size=1, amp="off", quiet=True, device="cpu",
)  # fmt: skip


def run(world, folder, **changes):
    from fastreid_u.data import load_dataset

    dataset = load_dataset("market1501", world)
    small = dict(arch="resnet10", weights=None, bn_group=None, center_per_camera=True, eval_step=1, eval_initial=True)
    return fastreid_u.train(dataset, logs_dir=folder, **{**TINY, **small, **changes})


def outcome(run):
    """Records without what differs from run to run, the clock."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in run.records]


@pytest.fixture(scope="module")
def finished(tiny_world, tmp_path_factory):
    return run(tiny_world, tmp_path_factory.mktemp("finished") / "run", quiet=False)


def test_a_run_folder_holds_what_was_promised(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {file.name for file in RunFolder(finished.folder).files()}
    assert (finished.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    stored = load_toml((finished.folder / "config.toml").read_text())
    assert stored["run"]["method"] == "cluster_contrast"
    assert stored["config"]["k1"] == 8
    lines = (finished.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == finished.records
    assert [record["epoch"] for record in finished.records] == [-1, 0, 1]
    about = json.loads((finished.folder / "model_last.json").read_text())
    assert about["epoch"] == 1
    assert about["config"]["arch"] == "resnet10"


def test_each_epoch_says_how_it_went(finished):
    for record in finished.records[1:]:
        assert record["clusters"] >= 1
        assert 0 <= record["unclustered"] < 1
        assert 1 <= record["largest"] <= 72
        assert -0.5 <= record["ari"] <= 1
        assert 0 <= record["nmi"] <= 1
        assert np.isfinite(record["loss"])
        assert 0 < record["mAP"] <= 1
        assert 0 <= record["top1"] <= record["top5"] <= record["top10"] <= 1
        assert set(record["seconds"]) == {"extract", "label", "fit", "evaluate"}
    assert finished.records[1]["agreement"] is None
    assert finished.records[2]["agreement"] is not None
    assert finished.records[1]["lr"] == pytest.approx(3.5e-4)
    assert finished.records[2]["lr"] == pytest.approx(3.5e-5)


def test_the_log_reads_from_table_to_final_block(finished):
    log = (finished.folder / "log.txt").read_text()
    assert re.search(r"subset +\| +# ids +\| +# images +\| +# cameras", log)
    assert "per-camera centring ON (not in the published recipe)" in log
    assert re.search(r"arch +resnet10 +published resnet50", log)
    assert re.search(r"epoch +clusters +unclust\.", log)
    assert re.search(r"Mean AP: +[\d.]+%\nCMC Scores:\n  top-1 ", log)
    assert log.count("subset") == 1


def test_same_seed_same_run_and_another_seed_another(finished, tiny_world, tmp_path):
    again = run(tiny_world, tmp_path / "again")
    assert outcome(again) == outcome(finished)
    other = run(tiny_world, tmp_path / "other", seed=2, epochs=1)
    assert outcome(other)[1] != outcome(finished)[1]


def test_a_resumed_run_equals_the_unbroken_one(finished, tiny_world, tmp_path, power_cut):
    folder = tmp_path / "broken"
    with power_cut(1):
        run(tiny_world, folder)
    resumed = run(tiny_world, folder, resume=True)
    assert outcome(resumed) == outcome(finished)
    ours, theirs = (load_file(r.folder / "model_last.safetensors") for r in (resumed, finished))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_process_loses_no_finished_epoch(finished, tiny_world, tmp_path):
    folder = tmp_path / "killed"
    settings = {**TINY, "arch": "resnet10", "weights": None, "bn_group": None, "center_per_camera": True,
                "eval_step": 1, "eval_initial": True, "epochs": 50}  # fmt: skip
    program = (
        "import fastreid_u; from fastreid_u.data import load_dataset; import torch; torch.set_num_threads(1)\n"
        f"fastreid_u.train(load_dataset('market1501', {str(tiny_world)!r}), logs_dir={str(folder)!r}, **{settings!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 600  # a busy machine is slow to start
        while not (folder / "state.safetensors").exists():
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = json.loads(checkpoint.read_tensors(folder / "state.safetensors")[1]["fastreid_u"])["epoch"]
    resumed = run(tiny_world, folder, resume=True, epochs=done + 2)
    assert [record["epoch"] for record in resumed.records] == list(range(-1, done + 2))
    if done == 0:
        assert outcome(resumed) == outcome(finished)


def test_a_taken_folder_is_refused_unless_told(finished, tiny_world):
    before = (finished.folder / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match=r"already holds a run; pass resume=True .* overwrite=True"):
        run(tiny_world, finished.folder)
    assert (finished.folder / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match="resume and overwrite must not both"):
        run(tiny_world, finished.folder, resume=True, overwrite=True)


def test_overwrite_starts_anew(tiny_world, tmp_path):
    run(tiny_world, tmp_path, epochs=2, iters=1)
    again = run(tiny_world, tmp_path, epochs=1, iters=1, overwrite=True)
    assert [record["epoch"] for record in again.records] == [-1, 0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("mistake", [{"arch": "resnet51"}, {"weights": "no/such/file.pth"}, {"eps": 2.0}])
def test_a_mistake_does_not_cost_the_run_that_was_to_be_overwritten(tiny_world, tmp_path, mistake):
    run(tiny_world, tmp_path, epochs=1, iters=1)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises((ValueError, FileNotFoundError)):
        run(tiny_world, tmp_path, overwrite=True, **mistake)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert (tmp_path / "state.safetensors").exists()


def test_resume_refuses_another_experiment(finished, tiny_world, tmp_path):
    with pytest.raises(ValueError, match=r"a resumed run must keep its settings .* got eps=0.3 instead of 0.6"):
        run(tiny_world, finished.folder, resume=True, eps=0.3)
    with pytest.raises(FileNotFoundError, match=r"no state\.safetensors"):
        run(tiny_world, tmp_path, resume=True)
    with pytest.raises(ValueError, match="logs_dir must name the run to resume"):
        fastreid_u.train("synthetic", resume=True)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tiny_world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write in run folder"):
        run(tiny_world, tmp_path / "file" / "run")


def test_a_full_disk_keeps_the_finished_epoch(tiny_world, tmp_path, monkeypatch):
    real, calls = checkpoint.flush, []

    def full_at_the_second_epoch(file):
        if "model_last.safetensors" in str(file.name):
            calls.append(file.name)
        if len(calls) == 2:
            file.truncate(file.tell() // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(checkpoint, "flush", full_at_the_second_epoch)
    with pytest.raises(checkpoint.SaveError, match=r"cannot write .*model_last.*No space left.*intact"):
        run(tiny_world, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*")), "no debris"
    resumed = run(tiny_world, tmp_path, resume=True)
    assert [record["epoch"] for record in resumed.records] == [-1, 0, 1]


def test_a_torn_checkpoint_is_refused_by_name(finished, tmp_path):
    whole = (finished.folder / "model_last.safetensors").read_bytes()
    torn = tmp_path / "model_last.safetensors"
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        torn.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            fastreid_u.load_model(torn)


def test_nan_loss_stops_before_memory_and_weights(tiny_world, tmp_path, monkeypatch):
    from fastreid_u.recipes.cluster_contrast import ClusterContrast

    updates = []
    monkeypatch.setattr(ClusterContrast, "loss", lambda self, x, batch: x.sum() * torch.nan)
    monkeypatch.setattr(ClusterContrast, "update", lambda self, x, batch: updates.append(batch))
    with pytest.raises(FloatingPointError, match="loss is nan at epoch 0, step 1"):
        run(tiny_world, tmp_path)
    assert not updates


def test_a_diverged_network_is_named(tiny_world, tmp_path, monkeypatch):
    from fastreid_u.models import ReIDModel

    monkeypatch.setattr(ReIDModel, "forward", lambda self, images: torch.full((len(images), 8), torch.nan))
    with pytest.raises(FloatingPointError, match=r"features of \d+ of \d+ images are NaN or infinite"):
        run(tiny_world, tmp_path, calibrate_bn=0, eval_initial=False)


def test_all_noise_is_a_named_error(tiny_world, tmp_path):
    with pytest.raises(loop.NoClustersError, match=r"epoch 0: all \d+ images are un-clustered at eps 0.0001"):
        run(tiny_world, tmp_path, eps=1e-4)


def test_one_cluster_warns_and_goes_on(tiny_world, tmp_path, monkeypatch):
    from fastreid_u.labels.generator import LabelGenerator

    monkeypatch.setattr(
        LabelGenerator, "forward", lambda self, features, epoch: torch.zeros(len(features), dtype=torch.int64)
    )
    result = run(tiny_world, tmp_path, epochs=1, quiet=False)
    assert result.last["clusters"] == 1
    assert result.last["loss"] == pytest.approx(0.0, abs=1e-6)
    assert "one cluster holds all clustered images" in (tmp_path / "log.txt").read_text()


@pytest.mark.filterwarnings("default:too few clusters to fill a batch of:RuntimeWarning")
def test_fewer_clusters_than_a_batch_needs_warns_once_and_goes_on(tiny_world, tmp_path, monkeypatch):
    from fastreid_u.labels.generator import LabelGenerator

    def two_clusters(self, features, epoch):
        return (torch.arange(len(features)) // 4).clamp(max=1)

    monkeypatch.setattr(LabelGenerator, "forward", two_clusters)
    result = run(tiny_world, tmp_path, quiet=False, batch_size=32)
    assert result.last["clusters"] == 2
    assert (tmp_path / "log.txt").read_text().count("identities repeat within a batch") == 1


def test_clusters_of_one_image_train(tiny_world, tmp_path, monkeypatch):
    from fastreid_u.labels.generator import LabelGenerator

    monkeypatch.setattr(LabelGenerator, "forward", lambda self, features, epoch: torch.arange(len(features)))
    assert np.isfinite(run(tiny_world, tmp_path, epochs=1, iters=2).last["loss"])


def test_identities_never_reach_the_training(finished, tiny_world, tmp_path):
    """The same images under shuffled identities give the same labels, loss and weights."""
    from fastreid_u.data import load_dataset

    dataset = load_dataset("market1501", tiny_world)
    pids = np.random.default_rng(0).permutation([sample.pid for sample in dataset.train]).tolist()
    import dataclasses

    shuffled = dataclasses.replace(
        dataset, train=tuple(s._replace(pid=pid) for s, pid in zip(dataset.train, pids, strict=True))
    )
    small = dict(arch="resnet10", weights=None, bn_group=None, center_per_camera=True, eval_step=1, eval_initial=True)
    blind = fastreid_u.train(shuffled, logs_dir=tmp_path, **{**TINY, **small})
    keys = ("clusters", "unclustered", "loss", "mAP")
    assert [[r[k] for k in keys] for r in blind.records[1:]] == [[r[k] for k in keys] for r in finished.records[1:]]
    assert blind.last["ari"] != finished.last["ari"]


def test_a_method_of_ones_own(tiny_world, tmp_path):
    from fastreid_u.recipes.cluster_contrast import ClusterContrast

    class Halved(ClusterContrast):
        name = "halved"
        title = "Half the loss"

        def loss(self, x, batch):
            return 0.5 * super().loss(x, batch)

    own = run(tiny_world, tmp_path / "own", method=Halved, epochs=1, iters=1)
    plain = run(tiny_world, tmp_path / "plain", epochs=1, iters=1)
    assert own.last["loss"] == pytest.approx(plain.last["loss"] / 2)


def test_evaluation_goes_back_to_the_world_that_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTREID_U_CACHE", str(tmp_path / "cache"))
    dials = dict(train_ids=6, test_ids=4, cameras=3, camera_presence=1.0, distractors=0, height=64, width=32, seed=7)
    small = dict(arch="resnet10", weights=None, bn_group=None, center_per_camera=True, epochs=1, iters=1)
    trained = fastreid_u.train("synthetic", data=dials, logs_dir=tmp_path / "run", **{**TINY, **small})
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.startswith("rendering "), "shown before the folder was known, and logged all the same"
    figures = fastreid_u.evaluate(tmp_path / "run", device="cpu", workers=0, quiet=True)
    assert figures["queries"] == trained.last["queries"] == 12
    assert figures["mAP"] == pytest.approx(trained.last["mAP"], abs=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "no other world was rendered"


def test_learning_rate_drops_per_step_size():
    from fastreid_u.config import Config

    rates = [optimizer.learning_rate(Config(lr=1.0, step_size=20, gamma=0.1), epoch) for epoch in (0, 19, 20, 40)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01])
    assert optimizer.learning_rate(Config(lr=1.0, step_size=0), 100) == 1.0

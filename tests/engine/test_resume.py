# SPDX-License-Identifier: Apache-2.0
"""Going on with a run, and what must never be mixed: other data, other settings, another run in the same folder."""

import os
import shutil
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import fastreid_u
from fastreid_u._toml import load_toml
from fastreid_u.cli import main
from fastreid_u.engine.lock import FolderInUse, locked
from fastreid_u.models import build_model

TINY = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=2,
    workers=0, k1=8, k2=3, center_per_camera=True, calibrate_bn=2, amp="off", quiet=True, device="cpu",
)  # fmt: skip


@pytest.fixture
def world(tiny_world, tmp_path):
    """A copy of the tiny world that a test may change."""
    return shutil.copytree(tiny_world, tmp_path / "Market-1501-v15.09.15")


def train(world, folder, **settings):
    return fastreid_u.train("market1501", root=world, logs_dir=folder, **{**TINY, **settings})


def resumed(folder, **settings):
    return fastreid_u.train(logs_dir=folder, resume=True, quiet=True, device="cpu", **settings)


def test_a_run_goes_on_from_what_it_was_told(world, tmp_path):
    """Root, options and settings are the run's; more epochs are remembered for the next time."""
    run = train(world, tmp_path / "run", epochs=1, method="csa_hps")
    told = load_toml((run.folder / "config.toml").read_text())["run"]
    assert told["dataset"] == "market1501"
    assert told["root"] == str(world)
    assert resumed(run.folder, epochs=2).last["epoch"] == 1
    (run.folder / "state.safetensors").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"no state\.safetensors"):
        resumed(run.folder)
    with pytest.raises(FileExistsError, match="without a finished epoch; pass overwrite=True"):
        train(world, run.folder)
    (tmp_path / "kept").rename(run.folder / "state.safetensors")
    assert resumed(run.folder).config.epochs == 2


def test_a_run_with_options_goes_on_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Rendered data of its own dials, a source, another directory: nothing has to be said again."""
    monkeypatch.setenv("FASTREID_U_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    dials = dict(
        train_ids=6, test_ids=2, cameras=2, images_per_camera=4, camera_presence=1.0, distractors=0, height=64, width=32
    )
    first = fastreid_u.train(
        "synthetic", method="spcl_uda", logs_dir=tmp_path / "run", data=dials, source="synthetic",
        source_data={**dials, "seed": 5}, epochs=1, **TINY,
    )  # fmt: skip
    rendered = sorted((tmp_path / "cache").iterdir())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--logs-dir", str(first.folder), "--resume", "--epochs", "2", "--device", "cpu"]) == 0
    assert "resumed after epoch 0" in capsys.readouterr().out
    assert sorted((tmp_path / "cache").iterdir()) == rendered
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_data_that_have_moved_are_found_in_the_usual_places(world, tmp_path, monkeypatch):
    run = train(world, tmp_path / "run", epochs=1)
    moved = world.rename(tmp_path / "market1501")
    monkeypatch.setenv("FASTREID_U_DATA", str(tmp_path))
    assert resumed(run.folder, epochs=2).last["epoch"] == 1
    assert load_toml((run.folder / "config.toml").read_text())["run"]["root"] == str(moved)


def test_what_a_run_does_not_know_must_be_given_again(world, tmp_path):
    from fastreid_u.data import load_dataset
    from fastreid_u.recipes import get_method

    class Mine(get_method("cluster_contrast")):
        name = "mine"

    ready = load_dataset("market1501", world)
    run = fastreid_u.train(ready, method=Mine, logs_dir=tmp_path / "run", epochs=1, **TINY)
    log = (run.folder / "log.txt").read_text()
    assert "published" not in log.replace("(not in the published recipe)", "")
    with pytest.raises(ValueError, match="dataset must be given again"):
        resumed(run.folder, method=Mine)
    with pytest.raises(ValueError, match=r"method must be given again, as FILE.py:CLASS .*\('mine'\)"):
        fastreid_u.train(ready, logs_dir=run.folder, resume=True)
    with pytest.raises(ValueError, match="data must be left out with a ready dataset"):
        fastreid_u.train(ready, logs_dir=tmp_path / "other", data={"layout": "flat"})
    (run.folder / ".log.early").write_text("left by a killed process\n")
    fastreid_u.train(ready, method=Mine, logs_dir=run.folder, resume=True, quiet=True, device="cpu", epochs=2)
    assert (run.folder / "log.txt").read_text().startswith(log)


def test_other_data_are_refused(world, tmp_path):
    run = train(world, tmp_path / "run", epochs=1)
    first, second, *_ = sorted((world / "bounding_box_train").glob("*.jpg"))
    first.rename(world / "away")
    with pytest.raises(ValueError, match=r"data must be the run's own, got others in .*: \d+ training images, the run"):
        resumed(run.folder, epochs=2)
    (world / "away").rename(first)
    second.rename(world / "away")
    first.rename(second)
    (world / "away").rename(first)  # two images have changed names
    told = (run.folder / "config.toml").read_text()
    with pytest.raises(ValueError, match="with other names, sizes, identities or cameras"):
        resumed(run.folder, epochs=2)
    assert (run.folder / "config.toml").read_text() == told


def test_a_torn_last_record_is_left_out_and_a_torn_other_one_named(world, tmp_path):
    run = train(world, tmp_path / "run", epochs=1)
    metrics = run.folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"epoch": 1, "clust')
    assert [record["epoch"] for record in resumed(run.folder, epochs=2).records][-2:] == [0, 1]
    metrics.write_text('{"epoch": 0, "clu\n' + whole)
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl must be a JSON object"):
        resumed(run.folder)
    metrics.unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl must be there"):
        resumed(run.folder)
    (run.folder / "config.toml").write_text("[config]\n")
    with pytest.raises(ValueError, match=r"config.toml must be as .*, got no data, dataset, method, root, run"):
        resumed(run.folder)


def test_the_weights_that_it_began_with_may_be_gone(world, tmp_path):
    torch.save(build_model("resnet10", weights=None, seed=5).state_dict(), tmp_path / "start.pth")
    run = train(world, tmp_path / "run", epochs=1, weights=tmp_path / "start.pth")
    (tmp_path / "start.pth").unlink()
    assert resumed(run.folder, epochs=2, weights=tmp_path / "start.pth").last["epoch"] == 1
    assert "start.pth, as trained so far" in (run.folder / "log.txt").read_text()


def test_stochastic_depth_repeats_and_resumes(world, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    vit = dict(arch="timm/test_vit", drop_path=0.5, calibrate_bn=0, epochs=2)
    whole = train(world, tmp_path / "whole", **vit)
    train(world, tmp_path / "parts", **vit | {"epochs": 1})
    torch.rand(7)  # whoever drew before
    again = resumed(tmp_path / "parts", epochs=2)
    assert [record["loss"] for record in again.records] == [record["loss"] for record in whole.records]


def test_numbers_of_numpy_are_settings(world, tmp_path):
    numbers = dict(epochs=np.int64(1), eps=np.float64(0.55), lr=np.float32(1e-3), no_cam=np.True_)
    run = train(world, tmp_path / "run", **numbers)
    assert run.config.no_cam is True
    assert (run.config.epochs, run.config.eps) == (1, 0.55)
    assert load_toml((run.folder / "config.toml").read_text())["config"]["eps"] == 0.55
    assert resumed(run.folder, epochs=2).last["epoch"] == 1


def test_a_folder_has_one_owner(world, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder), pytest.raises(FolderInUse, match="which another run of this process holds"):
        train(world, folder)
    program = (
        "import time, pathlib\nfrom fastreid_u.engine.lock import locked\n"
        f"with locked(pathlib.Path({str(folder)!r})):\n    print('mine', flush=True)\n    time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(FolderInUse, match=f"where process {other.pid} runs"):
            train(world, folder)
    finally:
        other.kill()
        other.wait()
    with locked(folder):  # the lock has died with its owner
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mistake", [{"source_data": {"a": 1}}, {"cache_images": True, "workers": 1}])
def test_what_fails_late_does_not_cost_the_run_to_be_overwritten(world, tmp_path, mistake, monkeypatch):
    from fastreid_u import data

    run = train(world, tmp_path / "run", epochs=1)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    monkeypatch.setattr(data, "PixelCache", lambda *given, **rest: (_ for _ in ()).throw(MemoryError("too large")))
    with pytest.raises((ValueError, MemoryError)):
        train(world, run.folder, overwrite=True, **mistake)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_files_have_the_users_modes_and_debris_is_swept(world, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".state.safetensors.1234.part").write_bytes(b"left by a killed process")
    run = train(world, folder, epochs=1)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.folder.iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"device": "foo"}, r"train: device must be cpu, cuda, cuda:1, \.\.\. and present, got 'foo'"),
        ({"dataset": None}, "dataset must be a name, a path or a ready data set, got None"),
        ({"data": "seed=1"}, "data must map a reader's options to values, got 'seed=1'"),
        ({"seed": 10**30}, r"seed must lie in \[0, 2\*\*32\)"),
    ],
)
def test_mistakes_are_named(tmp_path, given, error):
    with pytest.raises((TypeError, ValueError), match=error):
        fastreid_u.train(**{"dataset": "synthetic", "logs_dir": tmp_path} | given)


def test_torchs_defaults_are_left_alone(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    try:
        with torch.inference_mode():
            run = train(world, "~/run", epochs=1)
        assert torch.get_default_dtype() == torch.float64
        drawn = torch.rand(1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert run.folder == tmp_path / "run"
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, torch.rand(1, dtype=torch.float64))


def test_networks_built_in_two_threads_are_those_of_their_seed():
    expected = build_model("resnet10", weights=None, seed=1).state_dict()
    found = []

    def build():
        found.append(build_model("resnet10", weights=None, seed=1).state_dict())

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(state[name], expected[name]) for state in found for name in expected)

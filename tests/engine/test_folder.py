# SPDX-License-Identifier: Apache-2.0
"""A run folder: its files, its records, its lock, and runs that other versions wrote."""

import json
import shutil

import pytest
import torch

import fastreid_u
from fastreid_u._toml import dump_toml, load_toml
from fastreid_u.data import load_dataset, locate
from fastreid_u.engine import checkpoint
from fastreid_u.engine.folder import RunFolder, settings_text
from fastreid_u.engine.layout import LAYOUT, LayoutError
from fastreid_u.engine.lock import FolderInUse
from fastreid_u.engine.records import Records, highest_map
from fastreid_u.engine.state import State

TABLES = {
    "run": {"method": "spcl", "dataset": "market1501", "root": "/data"},
    "config": {"eps": 0.5}, "data": {}, "source_data": {},
}  # fmt: skip
TINY = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=1,
    epochs=1, workers=0, k1=8, k2=3, center_per_camera=True, amp="off", quiet=True, device="cpu",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """An empty run folder with settings."""
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    folder.begin(settings_text(TABLES))
    return folder


@pytest.fixture(scope="module")
def finished(tiny_world, tmp_path_factory):
    run = fastreid_u.train(
        load_dataset("market1501", tiny_world), logs_dir=tmp_path_factory.mktemp("finished") / "run", **TINY
    )
    return run.folder


def save(folder, epoch, mAP=None):
    record = {"epoch": epoch} | ({} if mAP is None else {"mAP": mAP})
    state = State(epoch, "digest", {"labels": torch.arange(3) + epoch})
    folder.save_epoch(record, torch.nn.Linear(2, 1), {"epoch": epoch}, state)


# Records


def test_the_best_record_is_the_first_with_the_highest_map():
    records = Records([{"epoch": -1, "mAP": 0.9}, {"epoch": 0}, {"epoch": 1, "mAP": 0.4}, {"epoch": 2, "mAP": 0.4}])
    assert records.best is records[2]
    assert records.last is records[3]
    assert Records([{"epoch": -1, "mAP": 0.9}, {"epoch": 0, "mAP": None}]).best is None
    assert highest_map([]) is None


def test_records_come_back_from_their_text(tmp_path):
    records = Records([{"epoch": 0, "loss": 0.1}, {"epoch": 1, "ari": None}])
    (tmp_path / "metrics.jsonl").write_text(records.to_text() + '{"torn')
    assert Records.read(tmp_path / "metrics.jsonl") == records
    (tmp_path / "metrics.jsonl").write_text("3\n" + records.to_text())
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl must be a JSON object, got '3'"):
        Records.read(tmp_path / "metrics.jsonl")


# The folder


def test_a_new_folder_holds_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.holds_run
    assert not folder.has_settings
    assert folder.finished_at is None
    folder.refuse_taken(overwrite=False)
    with pytest.raises(FileNotFoundError, match=r"finished epoch, got .*run \(no state\.safetensors\)"):
        folder.require_finished_epoch()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_a_folder_without_a_finished_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("no run")
    assert [folder.finished_at for folder in RunFolder.all_unnamed()] == [None]
    with pytest.raises(FileNotFoundError, match=r"finished epoch, got .*notes\.txt \(no state\.safetensors\)"):
        RunFolder("runs/notes.txt").require_finished_epoch()


@pytest.mark.parametrize(
    ("text", "missing"),
    [("run = 3", "config, data, dataset, method, root, run, source_data"), ("config = 3", "config")],
)
def test_settings_that_are_no_tables_are_refused_by_name(folder, text, missing):
    kept = {} if text.startswith("run") else {name: table for name, table in TABLES.items() if name != "config"}
    folder.config.write_text(text + "\n" + dump_toml(kept))
    with pytest.raises(ValueError, match=rf"train: .*config\.toml must be as train wrote it, got no {missing}$"):
        folder.settings()


def test_a_state_that_train_did_not_write_is_refused_by_name(folder):
    about = {"schema": LAYOUT, "epoch": 0, "data": "digest"}
    for name, described, tensors in (
        ("schema", {key: value for key, value in about.items() if key != "schema"}, {"labels": torch.arange(3)}),
        ("data, epoch", {"schema": LAYOUT}, {"labels": torch.arange(3)}),
        ("labels", about, {"rows": torch.arange(3)}),
    ):
        checkpoint.write_described(folder.state_file, tensors, described)
        with pytest.raises(ValueError, match=rf"state\.safetensors must be as train wrote it, got no {name}$"):
            folder.state()
    checkpoint.write_described(folder.state_file, {"rows": torch.arange(3)}, [1, 2])
    with pytest.raises(ValueError, match=r"got no data, epoch, labels, schema$"):
        folder.state()


def test_settings_come_back_with_their_layout(folder):
    assert folder.settings() == TABLES | {"run": TABLES["run"] | {"layout": LAYOUT}}
    with pytest.raises(FileExistsError, match="already holds a run without a finished epoch; pass overwrite=True"):
        folder.refuse_taken(overwrite=False)
    folder.refuse_taken(overwrite=True)


def test_each_epoch_is_saved_and_the_best_network_is_kept(folder):
    for epoch, figure in enumerate([0.3, None, 0.5, 0.5]):
        save(folder, epoch, figure)
    read = RunFolder(folder.path)
    assert read.records == folder.records
    assert (read.records.last["epoch"], read.records.best["epoch"]) == (3, 2)
    assert json.loads(read.model_text("last").read_text())["epoch"] == 3
    assert json.loads(read.model_text("best").read_text())["epoch"] == 2
    state = read.state()
    assert (state.epoch, state.fingerprint, state.tensors["labels"].tolist()) == (3, "digest", [3, 4, 5])
    assert read.finished_at == read.state_file.stat().st_mtime_ns
    read.require_finished_epoch()


def test_a_run_goes_on_after_an_epoch_without_the_later_records(folder):
    for epoch in range(3):
        save(folder, epoch)
    again = RunFolder(folder.path)
    again.go_on_after(1)
    again.add_record({"epoch": 2, "again": True})
    assert [record["epoch"] for record in RunFolder(folder.path).records] == [0, 1, 2]
    assert RunFolder(folder.path).records.last["again"]


def test_clean_removes_debris_and_a_run_only_when_asked(folder):
    save(folder, 0, 0.5)
    (folder.path / ".state.safetensors.7.part").touch()
    (folder.path / "notes.txt").touch()
    folder.clean(run=False)
    assert {path.name for path in folder.path.iterdir()} == {"notes.txt"} | {
        file.name for file in folder.files() if file not in (folder.log, folder.curves, folder.labels)
    }
    folder.clean(run=True)
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunFolder.locked_free("a") as first, RunFolder.locked_free("a") as second:
        assert (first.path.name, second.path.name) == ("a", "a-2")
        with pytest.raises(FolderInUse, match="which another run of this process holds"), first.locked():
            pass
        first.begin(settings_text(TABLES))
    with RunFolder.locked_free("a") as third:
        assert third.path.name == "a-2"
    assert {folder.path.name for folder in RunFolder.all_unnamed()} == {"a", "a-2"}


def test_data_know_a_run_by_the_names_that_it_has(folder):
    """data/ may not import engine/, and has the names that it looks for once more."""
    names = {file.name for file in folder.files()}
    assert {*locate._RUN_FILES, locate._RUN_PICTURE} <= names


# Other layouts


def relaid(run, folder, config=None, state=None):
    """A copy of ``run`` that names another layout in config.toml (0 = none at all) and in its state."""
    shutil.copytree(run, folder)
    copy = RunFolder(folder)
    if config is not None:
        tables = load_toml(copy.config.read_text())
        tables["run"]["layout"] = config or None  # None is written as a comment
        copy.config.write_text(dump_toml(tables))
    if state is not None:
        tensors, about = checkpoint.read_described(copy.state_file)
        checkpoint.write_described(copy.state_file, tensors, about | {"schema": state})
    return folder


def resumed(world, folder):
    dataset = load_dataset("market1501", world)
    return fastreid_u.train(dataset, logs_dir=folder, resume=True, quiet=True, device="cpu", epochs=2)


def test_a_run_of_layout_3_goes_on_and_has_a_number_from_then_on(finished, tiny_world, tmp_path):
    """Layout 3 has no number in config.toml."""
    folder = relaid(finished, tmp_path / "old", config=0, state=3)
    assert resumed(tiny_world, folder).last["epoch"] == 1
    assert RunFolder(folder).settings()["run"]["layout"] == LAYOUT


@pytest.mark.parametrize(
    ("layouts", "words"),
    [
        ({"config": LAYOUT + 1}, f"got layout {LAYOUT + 1} of a newer fastreid_u; use that version for it, or start"),
        ({"state": LAYOUT + 1}, f"got layout {LAYOUT + 1} of a newer fastreid_u"),
        ({"config": 0, "state": 2}, "got layout 2 of an older fastreid_u"),
    ],
)
def test_a_run_of_another_layout_is_refused_with_its_number(finished, tiny_world, tmp_path, layouts, words):
    folder = relaid(finished, tmp_path / "other", **layouts)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}
    with pytest.raises(LayoutError, match=rf"train: .*other must have run layout 3 or {LAYOUT} .*{words}"):
        resumed(tiny_world, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"} == before


def test_models_of_a_newer_layout_are_refused(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    tensors, about = checkpoint.read_described(folder / "model_last.safetensors")
    assert about["schema"] == LAYOUT
    for layout in (LAYOUT + 1, "new"):
        checkpoint.write_described(folder / "model_last.safetensors", tensors, about | {"schema": layout})
        with pytest.raises(LayoutError, match=rf"load_model: .* got layout {layout!r} of a newer fastreid_u; load it"):
            fastreid_u.load_model(folder)
    checkpoint.write_described(folder / "model_last.safetensors", tensors, about | {"schema": 3})
    fastreid_u.load_model(folder)


def test_evaluation_refuses_settings_of_a_newer_layout(finished, tmp_path):
    folder = relaid(finished, tmp_path / "run", config=LAYOUT + 1)
    with pytest.raises(LayoutError, match=f"evaluate: .* got layout {LAYOUT + 1} of a newer"):
        fastreid_u.evaluate(folder, device="cpu", quiet=True)

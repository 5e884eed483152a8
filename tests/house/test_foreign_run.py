# SPDX-License-Identifier: Apache-2.0
"""A run folder that somebody else made: opening it runs none of their code, and writes to none of the user's files."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import fastreid_u
from fastreid_u.cli import main


@pytest.fixture(scope="module")
def honest(tiny_world, tmp_path_factory):
    """The folder of a short run."""
    return fastreid_u.train(
        "market1501", root=tiny_world, logs_dir=tmp_path_factory.mktemp("honest") / "run", height=64, width=32,
        arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=2, epochs=1, workers=0,
        k1=8, k2=3, quiet=True, device="cpu",
    ).folder  # fmt: skip


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that appears when ``foreign.py``, which lies in the folder of the run and on the path, is imported."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "foreign.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(tmp_path / 'marker')!r}).touch()\n"
        "from fastreid_u.recipes.cluster_contrast import ClusterContrast as Foreign\n"
    )
    monkeypatch.syspath_prepend(run)
    monkeypatch.chdir(run)
    yield tmp_path / "marker"
    sys.modules.pop("foreign", None)


def tampered(honest: Path, run: Path, method: str) -> Path:
    """A copy of the honest run with ``method`` in place of its own, in config.toml and in the headers of its models."""
    shutil.copytree(honest, run, dirs_exist_ok=True)
    settings = run / "config.toml"
    text, count = re.subn(r'(?m)^method = ".*"$', f'method = "{method}"', settings.read_text())
    assert count == 1
    settings.write_text(text)
    for path in run.glob("model_*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["fastreid_u"])
        assert about["method"] == "cluster_contrast"
        save_file(tensors, path, metadata={"fastreid_u": json.dumps({**about, "method": method})})
    return run


FOREIGN = pytest.mark.parametrize("method", ["foreign:Foreign", "foreign.py:Foreign", "{run}/foreign.py:Foreign"])


@FOREIGN
@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--epochs", "2"], ["--method=cluster_contrast"]])
def test_resuming_from_the_shell_imports_nothing(honest, tmp_path, marker, capsys, method, words):
    method = method.format(run=tmp_path / "run")
    run = tampered(honest, tmp_path / "run", method)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    if "--method=cluster_contrast" in words:
        refusal = "method must be the run's own"
    else:
        refusal = "method must be given again"
    assert main(["train", "--logs-dir", str(run), "--resume", *words]) == 1
    err = capsys.readouterr().err
    assert refusal in err
    assert method in err
    assert not marker.exists()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@FOREIGN
def test_python_imports_nothing(honest, tiny_world, tmp_path, marker, method):
    method = method.format(run=tmp_path / "run")
    run = tampered(honest, tmp_path / "run", method)
    crops = tiny_world / "query"
    for attempt in (
        lambda: fastreid_u.train(logs_dir=run, resume=True, quiet=True, device="cpu"),
        lambda: fastreid_u.evaluate(run, quiet=True, device="cpu"),
        lambda: fastreid_u.evaluate(run, "market1501", root=tiny_world, quiet=True, device="cpu"),
        lambda: fastreid_u.extract(run, crops, device="cpu"),
        lambda: fastreid_u.load_model(run),
        lambda: fastreid_u.load_model(run / "model_last.safetensors"),
    ):
        with pytest.raises(ValueError, match=f"method.*{re.escape(repr(method))}"):
            attempt()
    assert main(["evaluate", str(run), "--device", "cpu"]) == 1
    assert main(["extract", str(run), str(crops), "--out", str(tmp_path / "f.npz"), "--device", "cpu"]) == 1
    assert not marker.exists()


def test_a_tampered_config_is_refused_where_only_the_data_are_read_from_it(honest, tmp_path, marker):
    run = tampered(honest, tmp_path / "run", "foreign:Foreign")
    for path in honest.glob("model_*"):
        shutil.copy(path, run)
    with pytest.raises(ValueError, match="'foreign:Foreign'"):
        fastreid_u.evaluate(run, quiet=True, device="cpu")
    assert not marker.exists()


def test_what_the_user_names_is_imported(honest, tmp_path, marker, capsys):
    run = tampered(honest, tmp_path / "run", "cluster_contrast")
    words = ["--method", "foreign.py:Foreign", "--epochs", "2", "--device", "cpu", "--quiet"]
    assert main(["train", "--logs-dir", str(run), "--resume", *words]) == 0, capsys.readouterr().err
    assert marker.exists()


@pytest.mark.parametrize("method", ["mine", "clustr_contrast", "os", "foreign"])
def test_an_unknown_name_is_no_module(honest, tmp_path, marker, capsys, method):
    """A run of one's own method is used without its class, and resumed with it."""
    run = tampered(honest, tmp_path / "run", method)
    for words in ([], ["--help"]):
        assert main(["train", "--logs-dir", str(run), "--resume", *words]) == 1
        assert (
            f"method must be given again, as FILE.py:CLASS or the class, for a run of one's own method ('{method}')"
            in (capsys.readouterr().err)
        )
    assert fastreid_u.load_model(run)[1]["method"] == method
    assert not marker.exists()


@pytest.mark.parametrize("name", [".lock", "log.txt"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_link_in_the_place_of_a_file_is_refused(honest, tmp_path, capsys, name, kind):
    run = shutil.copytree(honest, tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    mine = tmp_path / "mine.txt"
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(mine)
    if kind == "link":
        mine.write_text("the user's\n")
    told = (run / "config.toml").read_bytes()
    assert main(["train", "--logs-dir", str(run), "--resume", "--epochs", "2", "--device", "cpu"]) == 1
    assert re.search(rf"{re.escape(name)} must be a file of its own, got a link or a device", capsys.readouterr().err)
    assert mine.read_text() == "the user's\n" if kind == "link" else not mine.exists()
    assert (run / "config.toml").read_bytes() == told


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "state.safetensors", "model_last.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_is_not_read(honest, tiny_world, tmp_path, capsys, name, kind):
    """A pipe waits for a writer, /dev/zero fills the memory: resuming, evaluating and extracting refuse both."""
    run = shutil.copytree(honest, tmp_path / "run")
    (run / name).unlink()
    os.mkfifo(run / name) if kind == "pipe" else (run / name).symlink_to("/dev/zero")
    uses = [["train", "--logs-dir", str(run), "--resume", "--epochs", "2", "--device", "cpu", "--quiet"]]
    if name == "config.toml":
        uses += [[*uses[0], "--help"], ["evaluate", str(run), "--device", "cpu"]]
    if name.startswith("model"):
        uses = [["evaluate", str(run)], ["evaluate", str(run / name)], ["extract", str(run), str(tiny_world / "query")]]
    for words in uses:
        assert main(words) == 1
        assert re.search(
            rf"error: {words[0]}|load_model: .*{name} must be a regular file, got a ", capsys.readouterr().err
        )


def test_pickles_beside_a_run_are_not_opened(honest, tiny_world, tmp_path):
    """A folder holds no pickle, and what lies there under the usual names of one is nothing to a run."""
    run = shutil.copytree(honest, tmp_path / "run")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "marker",))

    for name in ("model_last.pth", "model_best.pt", "state.pth", "state.pkl", "checkpoint.pth.tar", "features.npy"):
        (run / name).write_bytes(pickle.dumps(Trap()))
    fastreid_u.train(logs_dir=run, resume=True, quiet=True, device="cpu")
    fastreid_u.evaluate(run, quiet=True, device="cpu", workers=0)
    fastreid_u.extract(run, tiny_world / "query", device="cpu", workers=0)
    for name in ("config.toml", "metrics.jsonl", "state.safetensors", "model_last.safetensors"):
        (run / name).write_bytes(pickle.dumps(Trap()))
    for use in (
        lambda: fastreid_u.train(logs_dir=run, resume=True, quiet=True, device="cpu"),
        lambda: fastreid_u.evaluate(run, quiet=True, device="cpu"),
        lambda: fastreid_u.load_model(run),
    ):
        with pytest.raises(ValueError, match=r"config\.toml must be as train wrote it|not a readable safetensors file"):
            use()
    assert not (tmp_path / "marker").exists()


def test_a_run_that_overwrites_replaces_links(honest, tiny_world, tmp_path):
    run = shutil.copytree(honest, tmp_path / "run")
    names = ("log.txt", "metrics.jsonl", "config.toml", "state.safetensors", "curves.png")
    for name in names:
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "mine.txt")
    fastreid_u.train(
        "market1501", root=tiny_world, logs_dir=run, overwrite=True, height=64, width=32, arch="resnet10", weights=None,
        bn_group=None, batch_size=16, num_instances=4, iters=2, epochs=1, workers=0, k1=8, k2=3, quiet=True,
        device="cpu",
    )  # fmt: skip
    assert not (tmp_path / "mine.txt").exists()
    assert not any((run / name).is_symlink() for name in names)

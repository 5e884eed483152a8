# SPDX-License-Identifier: Apache-2.0
"""The command line: field names and the field's usual flags, every message a person may meet."""

import os
import re

import numpy as np
import pytest

import fastreid_u
from fastreid_u.cli import main

SMALL = [
    "--height", "64", "--width", "32", "-a", "resnet10", "--weights", "None", "--bn-group", "None", "--workers", "0",
    "--iters", "2", "--epochs", "1", "-b", "16", "--num-instances", "4", "--k1", "8", "--k2", "3", "--device", "cpu",
    "--no-center-per-camera", "--no-eval-initial",
]  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """What ``train`` is called with, instead of training."""
    calls = []

    def record(dataset, **arguments):
        calls.append({"dataset": dataset, **arguments})

    monkeypatch.setattr("fastreid_u.engine.train.train", record)
    return calls


def test_the_usual_flags_reach_their_fields(seen):
    flags = (
        "train market1501 -b 128 -a ibn50a --iters 100 --eps 0.5 --k1 20 --k2 4 --num-instances 8 --temp 0.1 "
        "--momentum 0.2 --use-hard --pooling-type avg --no-cam -j 2 --data-dir /data --logs-dir here --seed 3"
    )
    assert main(flags.split()) == 0
    expected = {
        "batch_size": 128, "arch": "ibn50a", "iters": 100, "eps": 0.5, "k1": 20, "k2": 4, "num_instances": 8,
        "temp": 0.1, "momentum": 0.2, "use_hard": True, "pooling_type": "avg", "no_cam": True, "workers": 2, "seed": 3,
    }  # fmt: skip
    call = seen[0]
    assert {name: call[name] for name in expected} == expected
    assert (call["dataset"], call["root"], call["logs_dir"], call["method"]) == ("market1501", "/data", "here", None)


def test_only_what_was_given_is_passed_on(seen):
    assert main(["train", "-d", "synthetic", "--data", "shift=1.0", "--data", "seed=7", "--resume"]) == 0
    assert seen[0]["dataset"] == "synthetic"
    assert seen[0]["data"] == {"shift": 1.0, "seed": 7}
    assert seen[0]["resume"] is True
    assert "eps" not in seen[0]


def test_what_was_said_counts_even_if_it_is_the_default(seen):
    """A resumed run may have other settings than the defaults, and a set other defaults than the method."""
    assert main(["train", "synthetic", "--logs-dir", "x", "--resume", "--epochs", "18", "--no-use-hard"]) == 0
    assert (seen[0]["epochs"], seen[0]["use_hard"]) == (18, False)
    assert main(["train", "Market-1501", "--iters=400", "--step_size", "20"]) == 0
    assert (seen[1]["iters"], seen[1]["step_size"]) == (400, 20)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("market1501 -b8 -aresnet18_w32 -j0", {"batch_size": 8, "arch": "resnet18_w32", "workers": 0}),
        ("-d market1501 --iters 200", {"iters": 200}),
        ("-dmarket1501 -b=64", {"batch_size": 64}),
        ("-b 256 -a resnet50 -d market1501", {"batch_size": 256, "arch": "resnet50"}),
        ("--epochs 1 --quiet market1501 --use-hard", {"epochs": 1, "use_hard": True}),
        ("--use-hard market1501 --bn-group None", {"use_hard": True, "bn_group": None}),
    ],
)
def test_flags_in_any_order_and_spelling_are_all_heard(seen, words, expected):
    assert main(["train", *words.split()]) == 0
    call = seen[0]
    ours = {"dataset", "method", "root", "logs_dir", "resume", "overwrite", "device", "quiet", "data", "source_data"}
    assert call["dataset"] == "market1501"
    assert {name: call[name] for name in call.keys() - ours} == expected


def test_a_method_of_unusual_option_types_is_heard_too(seen, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses, pathlib\n"
        "from fastreid_u.config import option\n"
        "from fastreid_u.methods import get_method\n"
        "Base = get_method('cluster_contrast')\n"
        "class Mine(Base):\n"
        "    name = 'mine'\n"
        "    @dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "    class Config(Base.Config):\n"
        "        extra: pathlib.Path = option(pathlib.Path('a'), 'a file')\n"
    )
    method = f"{tmp_path / 'mine.py'}:Mine"
    assert main(["train", "synthetic", "--method", method]) == 0
    assert "extra" not in seen[0]
    assert main(["train", "synthetic", "--method", method, "--extra", "b"]) == 0
    assert str(seen[1]["extra"]) == "b"


@pytest.mark.parametrize("words", ["market1501 crops", "market1501 --iter 5", "market1501 --use-hard=yes"])
def test_a_word_that_sets_nothing_is_refused(seen, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *words.split()])
    assert stop.value.code == 2
    assert "Unrecognized options" in capsys.readouterr().err
    assert not seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train synthetic", "interrupted: no epoch was finished"),
        ("train synthetic --logs-dir a", "interrupted: no epoch was finished"),
        ("train synthetic --logs-dir b", "go on with: fastreid-u train --logs-dir b --resume"),
        ("train market1501", "go on with: fastreid-u train --logs-dir runs/new --resume"),
        ("train synthetic --logs-dir old --resume", "--logs-dir old --resume"),
    ],
)
def test_ctrl_c_says_what_there_is_to_go_on_from(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/old", "old"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "state.safetensors").touch()
        os.utime(tmp_path / folder / "state.safetensors", (1, 1))

    def stopped(dataset, *, logs_dir, **arguments):
        if finished := {("synthetic", "b"): "b", ("market1501", None): "runs/new"}.get((dataset, logs_dir)):
            (tmp_path / finished).mkdir()
            (tmp_path / finished / "state.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("fastreid_u.engine.train.train", stopped)
    assert main(words.split()) == 130
    assert message in capsys.readouterr().err


def test_ctrl_c_of_other_commands_promises_nothing(monkeypatch, capsys):
    def stopped(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastreid_u.trained.evaluate.evaluate", stopped)
    assert main(["evaluate", "run"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "crops", "-d", "market1501"], "dataset must be given once, got 'crops' and -d 'market1501'"),
        (["evaluate", "x", "--data", "shift"], "evaluate: --data must be KEY=VALUE, got 'shift'"),
        (["extract", "x", "y", "--out", "/nowhere/f.npz"], "--out must be a file in an existing folder .*, got /nowhe"),
        (["extract", "x", "y", "--out", "/"], "--out must be a file in an existing folder"),
        (["train"], "dataset must be one of .*market1501.*, a folder or a CSV, got none"),
        (["train", "markt1501"], "(?s)markt1501.*market1501"),
        (["train", "synthetic", "--method", "spcll"], "method must be one of .*, got 'spcll'"),
        (["train", "synthetic", "--eps", "1.5"], r"eps must lie in \(0, 1\), got 1.5"),
        (["train", "synthetic", "--data", "shift"], "--data must be KEY=VALUE, got 'shift'"),
        (["train", "synthetic", "--data", "shft=1"], "shft"),
        (["evaluate", "/nowhere"], "run must be a run folder or a model file, got /nowhere"),
    ],
)
def test_a_mistake_gets_one_line_and_status_1(arguments, message, capsys):
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert re.search(message, err)
    assert "Traceback" not in err


def test_help_shows_defaults_and_their_sources(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "market1501", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--resume", "--data-dir", "--eps", "--num-instances", "-b", "published training commands"):
        assert word in out
    iters = " ".join(out[out.index("--iters") :].replace("│", " ").split())
    assert "(default: 200)" in iters[: iters.index("--step-size")], (
        "the default of this data set, not the 400 of others"
    )


def test_methods_and_capabilities(capsys):
    assert main(["methods"]) == 0
    assert re.search(r"^cluster_contrast +Cluster Contrast$", capsys.readouterr().out, re.MULTILINE)
    assert main([]) == 0
    assert "torch" in capsys.readouterr().out


def test_train_evaluate_extract_from_the_shell(tiny_world, tmp_path, capsys):
    folder = str(tmp_path / "run")
    train_folder = str(tiny_world / "bounding_box_train")
    assert main(["train", "market1501", "--data-dir", str(tiny_world), "--logs-dir", folder, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Mean AP:" in out
    assert main(["evaluate", folder, "market1501", "--data-dir", str(tiny_world), "--device", "cpu"]) == 0
    block = out[out.index("Mean AP:") : out.index("mINP")]
    assert block in capsys.readouterr().out, "the same network, the same figures"
    assert main(["extract", folder, train_folder, "--out", str(tmp_path / "features"), "--device", "cpu"]) == 0
    target = tmp_path / "features.npz"
    assert capsys.readouterr().out.startswith(f"{target}: (72, ")
    assert list(tmp_path.glob("*feat*")) == [target], "written beside its place, then renamed"
    stored = np.load(target)
    assert len(stored["features"]) == len(stored["paths"]) == 72
    np.testing.assert_allclose(np.linalg.norm(stored["features"], axis=1), 1, atol=1e-5)


def test_a_folder_of_crops_is_all_it_takes(tiny_world, tmp_path, capsys):
    """No identities, no cameras, no query: labels are made, evaluation is left out with a warning."""
    flat = tmp_path / "crops"
    flat.mkdir()
    for number, path in enumerate(sorted((tiny_world / "bounding_box_train").glob("*.jpg"))):
        (flat / f"{number:04d}.jpg").write_bytes(path.read_bytes())
    assert main(["train", str(flat), "--logs-dir", str(tmp_path / "run"), *SMALL, "--eps", "0.7"]) == 0
    out = capsys.readouterr().out
    assert "nothing to evaluate" in out
    assert "Mean AP" not in out
    assert (tmp_path / "run" / "model_last.safetensors").exists()
    assert not (tmp_path / "run" / "model_best.safetensors").exists()


def test_python_calls_mirror_the_shell(tiny_world, tmp_path):
    from fastreid_u.data import load_dataset

    dataset = load_dataset("market1501", tiny_world)
    run = fastreid_u.train(
        dataset, logs_dir=tmp_path / "run", height=64, width=32, arch="resnet10", weights=None, bn_group=None,
        workers=0, iters=2, epochs=1, batch_size=16, num_instances=4, k1=8, k2=3, quiet=True, device="cpu",
    )  # fmt: skip
    metrics = fastreid_u.evaluate(run.folder, dataset, device="cpu", workers=0, quiet=True)
    assert metrics["mAP"] == pytest.approx(run.last["mAP"], abs=1e-9)
    model, about = fastreid_u.load_model(run.folder, which="best")
    assert about["epoch"] == 0
    assert not model.training
    with pytest.raises(ValueError, match="which must be 'last' or 'best', got 'first'"):
        fastreid_u.load_model(run.folder, which="first")
    features, paths, bad = fastreid_u.extract(run.folder, [s.path for s in dataset.query], device="cpu", workers=0)
    assert features.shape == (len(dataset.query), model.num_features)
    assert paths == [s.path for s in dataset.query]
    assert not bad

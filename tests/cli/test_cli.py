# SPDX-License-Identifier: Apache-2.0
"""The command line: field names and the field's usual flags, every message a person may meet."""

import argparse
import dataclasses
import os
import re
from typing import get_type_hints

import numpy as np
import pytest

import fastreid_u
from fastreid_u._toml import dump_toml
from fastreid_u.cli import main
from fastreid_u.cli.options import add_options
from fastreid_u.config import Config, option
from fastreid_u.recipes import get_method, methods

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
        ("market1501 --bn-group none --weights none", {"bn_group": None, "weights": None}),
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
        "from fastreid_u.recipes import get_method\n"
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train market1501 crops", "Unrecognized options: crops\n"),
        ("train market1501 --iter 5", "Unrecognized options: --iter 5; did you mean --iters?"),
        ("train market1501 --method ice --use-hard", "Unrecognized options: --use-hard"),
        ("train market1501 -x", "Unrecognized options: -x\n"),
        ("train market1501 -- --epochs 3", "Unrecognized options: --epochs 3"),
        ("train market1501 --use-hard=yes", "--use-hard/--no-use-hard: ignored explicit argument 'yes'"),
        ("train market1501 --epochs 1e2", "argument --epochs: must be int, got '1e2'"),
        ("train market1501 --bn-group nine", "argument --bn-group: must be int or None, got 'nine'"),
        ("train market1501 --height", "argument --height: expected one argument"),
        ("evaluate run set more", "unrecognized arguments: more"),
        ("methods more", "unrecognized arguments: more"),
        ("doctor more", "unrecognized arguments: more"),
        ("trian market1501", "invalid choice: 'trian'"),
    ],
)
def test_a_word_that_sets_nothing_is_refused(seen, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not seen


def a_word_for(field, hint):
    """Words that set the field to something that is not its default, and what that is."""
    flag = "--" + field.name.replace("_", "-")
    if hint in (bool, bool | None):
        return [flag if not field.default else f"--no-{flag[2:]}"], not field.default
    if field.metadata["choices"]:
        other = next(choice for choice in field.metadata["choices"] if choice != field.default)
        return [flag, other], other
    if hint in (int | None, str | None) and field.default is not None:
        return [flag, "None"], None
    value = {int: 77, int | None: 77, float: 0.77, str: "other", str | None: "other"}[hint]
    return [flag, str(value)], value


@pytest.mark.parametrize("name", methods())
def test_every_setting_of_every_method_can_be_given(seen, name):
    config = get_method(name).Config
    hints = get_type_hints(config)
    given = {field.name: a_word_for(field, hints[field.name]) for field in dataclasses.fields(config)}
    words = [word for words, _ in given.values() for word in words]
    assert main(["train", "market1501", "--method", name, *words]) == 0
    assert {setting: seen[0][setting] for setting in given} == {setting: value for setting, (_, value) in given.items()}
    assert [type(seen[0][setting]) for setting in given] == [type(value) for _, value in given.values()]


@pytest.mark.parametrize("name", methods())
def test_help_of_every_method(name, capsys, monkeypatch):
    """Each setting with its flags, what it is, the source of its default, and the default for the data set."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    with pytest.raises(SystemExit) as stop:
        main(["train", "synthetic", "--method", name, "-h"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"settings of {name}:" in out
    config = get_method(name).Config
    defaults = config.for_dataset("synthetic").to_dict()
    for field in dataclasses.fields(config):
        about = field.metadata
        assert f"{about['help']} [{about['source']}] (default: {defaults[field.name]})" in out, field.name
        assert all(f" {flag} " in out for flag in about["flags"])
        assert not about["choices"] or f"{{{','.join(about['choices'])}}}" in out


def test_the_parser_of_train_is_made_once(seen, monkeypatch):
    made = []
    real = argparse.ArgumentParser.__init__

    def counted(self, *arguments, **settings):
        made.append(settings.get("usage"))
        real(self, *arguments, **settings)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", counted)
    assert main(["train", "market1501", "-b8"]) == 0
    assert made.count("fastreid-u train DATASET [options]") == 1


def test_the_command_line_needs_a_type_that_a_word_can_be_read_as():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(Config):
        sizes: tuple[int, ...] = option((1, 2), "sizes")

    with pytest.raises(TypeError, match=r"config: sizes must be of bool, .* a path or None, got tuple\[int, \.\.\.\]"):
        add_options(argparse.ArgumentParser(), Odd)


def test_a_flag_belongs_to_one_setting():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice(Config):
        beta: float = option(1.0, "a weight", flags=("-b",))

    with pytest.raises(ValueError, match=r"config: beta must have flags of its own, got .*-b"):
        add_options(argparse.ArgumentParser(), Twice)


@pytest.mark.parametrize(
    ("words", "value"),
    [("--either 5", 5), ("--either five", "five"), ("--either None", None), ("--maybe None", None),
     ("--maybe True", True), ("--maybe False", False)],
)  # fmt: skip
def test_types_of_which_a_word_may_be_one(words, value):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(Config):
        either: str | int | None = option(None, "a number or a name")
        maybe: bool | None = option(None, "yes, no, or neither")

    parser = argparse.ArgumentParser()
    add_options(parser, Odd)
    assert list(vars(parser.parse_args(words.split())).values()) == [value]


@pytest.mark.parametrize("more", [[], ["--help"], ["market1501"]])
def test_a_run_folder_names_no_file_to_import(seen, more, tmp_path, capsys):
    """The folder may be another person's: what it holds is read, never run."""
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    run = {"method": f"{tmp_path / 'theirs.py'}:Theirs", "dataset": "market1501", "root": "data"}
    (tmp_path / "config.toml").write_text(dump_toml({"run": run, "config": {}, "data": {}, "source_data": {}}))
    assert main(["train", "--logs-dir", str(tmp_path), "--resume", *more]) == 1
    assert re.search("error: train: method must be given again, as FILE.py:CLASS", capsys.readouterr().err)
    assert not (tmp_path / "was_run").exists()
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
        (["extract", "x", "y", "--out", "/proc/no/f.npz"], "--out must be a file in an existing folder .*, got /proc"),
        (["extract", "x", "y", "--out", "/"], "--out must be a file in an existing folder"),
        (["train"], "dataset must be one of .*market1501.*, a folder or a CSV, got none"),
        (["train", "markt1501"], "(?s)markt1501.*market1501"),
        (["train", "synthetic", "--method", "spcll"], "method must be one of .*, got 'spcll'"),
        (["train", "synthetic", "--eps", "1.5"], r"eps must lie in \(0, 1\), got 1.5"),
        (["train", "synthetic", "--data", "shift"], "--data must be KEY=VALUE, got 'shift'"),
        (["train", "synthetic", "--data", "shft=1"], "shft"),
        (["evaluate", "/proc/nowhere"], "run must be a run folder or a model file, got /proc/nowhere"),
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
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"cluster_contrast +Cluster Contrast", line) for line in lines)
    assert len({re.match(r"\S+ +", line).end() for line in lines}) == 1  # the titles stand below each other
    assert main([]) == 0
    table = capsys.readouterr().out
    assert "torch" in table
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == table


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
    said = capsys.readouterr().out.splitlines()  # a busy machine also shows how far it is
    assert said[-1].startswith(f"{target}: (72, ")
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

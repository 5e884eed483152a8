# SPDX-License-Identifier: Apache-2.0
"""A run folder that has lost something, or holds something else: resuming names it, or has it back."""

import json
import shutil

import pytest
import torch

import fastreid_u
from fastreid_u._toml import load_toml
from fastreid_u.cli import main
from fastreid_u.engine import checkpoint
from fastreid_u.engine.folder import RunFolder

TINY = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=1,
    epochs=2, workers=0, k1=8, k2=3, amp="off", eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_world, tmp_path_factory):
    """The folder of a run of two epochs, of which the first is the better."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        from fastreid_u.engine import loop

        figures = iter([0.5, 0.25])
        real = loop._ranking
        patch.setattr(loop, "_ranking", lambda s: (real(s)[0] | {"mAP": next(figures)}, real(s)[1]))
        fastreid_u.train("market1501", root=tiny_world, logs_dir=folder, **TINY)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may damage."""
    return RunFolder(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than all else here."""
    from fastreid_u.engine import loop

    monkeypatch.setattr(loop, "draw_curves", lambda *given, **more: None)


def resume(run, **settings):
    return fastreid_u.train(logs_dir=run.path, resume=True, quiet=True, device="cpu", **settings)


def restated(run, change, **header):
    """Write the state again, with a right checksum, after ``change(tensors)``; a value of None takes an entry out."""
    tensors, about = checkpoint.read_described(run.state_file)
    tensors = change(tensors) or tensors
    about = {name: value for name, value in (about | header).items() if value is not None}
    checkpoint.write_described(run.state_file, tensors, about)


AS_BEFORE = dict(records=None, settings=None, surroundings=None)  # a state of a version that did not keep them


# The state


def test_damage_is_named_in_the_shell(run, capsys):
    data = bytearray(run.state_file.read_bytes())
    data[len(data) // 2] ^= 64
    run.state_file.write_bytes(data)
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.name != "log.txt"}
    assert main(["train", "--logs-dir", str(run), "--resume", "--epochs", "3", "--device", "cpu", "--quiet"]) == 1
    assert "error: train: " in (err := capsys.readouterr().err)
    assert "state.safetensors is damaged" in err
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.name != "log.txt"} == before


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def with_(**more):
    return lambda tensors: tensors | {name.replace("__", "."): make(tensors) for name, make in more.items()}


@pytest.mark.parametrize(
    ("change", "header", "words"),
    [
        (without("optimizer."), AS_BEFORE, "got no moments of the optimiser"),
        (without("optimizer.3.exp_avg_sq"), {}, "got no 'optimizer.3.exp_avg_sq'"),
        (with_(optimizer__999__step=lambda t: torch.tensor(1.0)), {}, r"got 'optimizer.999.step', which adam of \d+ w"),
        (with_(optimizer__x__step=lambda t: torch.tensor(1.0)), {}, "got 'optimizer.x.step', which adam"),
        (with_(optimizer__0__exp_avg=lambda t: torch.zeros(3)), {}, r"'optimizer.0.exp_avg' as torch.float32 of shape"),
        (with_(labels=lambda t: t["labels"] - 99), {}, "got labels from -100 to "),
        (with_(labels=lambda t: t["labels"] + 2**40), {}, f"got labels from {2**40 - 1} to "),
        (with_(labels=lambda t: t["labels"].float()), {}, "got 'labels' as torch.float32 of shape"),
        (with_(labels=lambda t: t["labels"].sum()), {}, "the data must be the run's own"),
        (with_(readable=lambda t: t["readable"].long()), {}, "got 'readable' as torch.int64"),
        (without("readable"), {}, "got no 'readable'"),
        (without("labels"), {}, "got no labels"),
        (with_(foreign__group=lambda t: torch.zeros(1)), {}, "got 'foreign.group', which no run has"),
        (with_(recipe=lambda t: torch.zeros(1)), {}, "got 'recipe', which no run has"),
        (
            with_(recipe__more=lambda t: torch.zeros(1)),
            {},
            "got 'recipe.more', which method 'cluster_contrast' has not",
        ),
        (without("recipe.model.bnneck.weight"), {}, r'Missing key\(s\) in state_dict: "model.bnneck.weight"'),
        (with_(recipe__model__bnneck__weight=lambda t: torch.ones(3)), {}, "size mismatch for model.bnneck.weight"),
        (
            with_(recipe__memory__features=lambda t: t["recipe.memory.features"].double()),
            {},
            "'recipe.memory.features'",
        ),
        (without(), {"epoch": 99}, "must hold a record of each finished epoch, 0 to 99, got none in the place of ep"),
        (without(), {"epoch": 99, **AS_BEFORE}, "metrics.jsonl must hold a record of each finished epoch, 0 to 99"),
        (without(), {"epoch": 0}, "0 to 0, got epoch 1 in the place of epoch 1"),
        (without(), {"epoch": "1"}, "must hold epoch as a whole number from -1, got '1'"),
        (without(), {"epoch": -2}, "must hold epoch as a whole number from -1, got -2"),
        (without(), {"data": 5}, "must hold data as text, got 5"),
        (without(), {"schema": None}, "got no schema"),
        (without(), {"epoch": None}, "got no epoch"),
        (without(), {"settings": None}, "got no settings"),
        (without(), {"records": [{"mAP": 0.1}, 5]}, "must name its epoch, a whole number, got None"),
    ],
)
def test_a_state_of_something_else_is_refused_with_the_first_difference(run, change, header, words):
    restated(run, lambda tensors: change(tensors) if change else None, **header)
    with pytest.raises(ValueError, match=rf"^train: .*{words}"):
        resume(run)


def test_a_state_of_a_version_without_checksums_goes_on(run, tiny_world):
    tensors, about = checkpoint.read_described(run.state_file)
    old = {name: about[name] for name in ("schema", "epoch", "data")}
    from safetensors.torch import save_file

    save_file(tensors, run.state_file, metadata={"fastreid_u": json.dumps(old)})
    assert resume(run, epochs=3).last["epoch"] == 2
    assert len(RunFolder(run.path).state().records) == 3


# The records


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 3],
        lambda text: text.splitlines(True)[1],
        lambda text: text.splitlines(True)[0],
        lambda text: text.splitlines(True)[0] + "\0" * 200,
        lambda text: text.replace('"mAP": 0.5', '"mAP": 0.1'),
    ],
)
def test_lost_records_come_back_and_the_best_network_stays(run, damage):
    told, best = run.metrics.read_text(), run.model_file("best").read_bytes()
    run.metrics.write_text(damage(told))
    found = resume(run)
    assert run.metrics.read_text() == told
    assert found.best["epoch"] == 0
    assert "metrics.jsonl had lost records, or held others; those until epoch 1 are back" in run.log.read_text()
    assert run.model_file("best").read_bytes() == best


def test_a_worse_network_does_not_replace_the_best_when_records_were_lost(run, monkeypatch):
    from fastreid_u.engine import loop

    real = loop._ranking
    monkeypatch.setattr(loop, "_ranking", lambda s: (real(s)[0] | {"mAP": 0.4}, real(s)[1]))
    best = run.model_file("best").read_bytes()
    run.metrics.write_text("")
    assert resume(run, epochs=3).best["epoch"] == 0
    assert run.model_file("best").read_bytes() == best


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (slice(1), "got none in the place of epoch 1"),
        (slice(1, 2), "got epoch 1 in the place of epoch 0"),
        (slice(0), "got none in the place of epoch 0"),
    ],
)
def test_a_state_without_records_wants_one_of_each_epoch(run, lines, words):
    restated(run, without(), **AS_BEFORE)
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(True)[lines]))
    before = run.metrics.read_text()
    with pytest.raises(ValueError, match=f"metrics.jsonl must hold a record of each finished epoch, 0 to 1, {words}"):
        resume(run)
    assert run.metrics.read_text() == before


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ('{"clusters": 3}', "line 1 of .*metrics.jsonl must name its epoch, a whole number, got None"),
        ('{"epoch": 0, "mAP": "0.3"}', "line 1 of .*metrics.jsonl must hold mAP as a number, got '0.3'"),
    ],
)
def test_a_record_without_its_epoch_or_with_words_for_a_figure_is_named(run, record, words):
    run.metrics.write_text(record + "\n" + run.metrics.read_text())
    with pytest.raises(ValueError, match=words):
        resume(run)


def test_records_are_on_the_disk_before_the_state(run, monkeypatch):
    """After a power cut, the state is never ahead of them."""
    from fastreid_u.engine import folder

    order, flush = [], checkpoint.flush

    def noted(file):
        order.append(file.name if isinstance(file.name, str) else str(file.name))
        flush(file)

    monkeypatch.setattr(checkpoint, "flush", noted)
    monkeypatch.setattr(folder, "flush", noted)
    resume(run, epochs=3)
    names = [name.rpartition("/")[2] for name in order]
    assert names.index("metrics.jsonl") < next(i for i, name in enumerate(names) if name.startswith(".state"))


# The settings


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("eps = ", "eps = 0.4 #", "config.eps=0.4 instead of 0.6"),
        ("lr = ", "lr = 0.5 #", "config.lr=0.5 instead of 0.00035"),
        ("seed = ", "seed = 2 #", "config.seed=2 instead of 1"),
        ("gamma = ", "# gamma = ", "config: gamma must be float, got None"),
        ("[config]", "[config]\nespilon = 3", "config.espilon=3 instead of None"),
        ("torch = ", 'torch = "1.0" #', "run.torch='1.0' instead of "),
    ],
)
def test_settings_that_were_edited_are_refused_by_name(run, old, new, words):
    text = run.config.read_text()
    assert f"\n{old}" in text
    run.config.write_text(text.replace(f"\n{old}", f"\n{new}", 1))
    edited = run.config.read_text()
    with pytest.raises((ValueError, TypeError), match=words):
        resume(run)
    assert run.config.read_text() == edited


def test_what_may_change_may_be_edited(run):
    run.config.write_text(run.config.read_text().replace("epochs = 2\n", "epochs = 3\n"))
    assert resume(run).last["epoch"] == 2
    assert load_toml(RunFolder(run.path).state().settings)["config"]["epochs"] == 3


def test_an_unknown_setting_of_an_older_run_is_named(run):
    restated(run, without(), **AS_BEFORE)
    run.config.write_text(run.config.read_text().replace("[config]", "[config]\nespilon = 3"))
    resume(run)
    assert "config.toml names espilon, which method 'cluster_contrast' has not" in run.log.read_text()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("root = ", "root = 5 #", "must hold run.root as text, got 5"),
        ("dataset = ", "dataset = 5 #", "must hold run.dataset as text, got 5"),
        ("method = ", "method = [1] #", r"must hold run.method as text, got \[1\]"),
        ("[run]", "source_root = 5\n[run]", None),
        (
            "[data]",
            "[data]\nlayout = 1979-05-27",
            "must hold data.layout as text, a number, true or false, got datetime",
        ),
        ("[run]", "[[run]]", "must be as train wrote it, got no .*run"),
    ],
)
def test_values_of_a_wrong_kind_are_named_wherever_settings_are_read(run, old, new, words):
    if words is None:
        new, words = "[run]\nsource_root = 5", "must hold run.source_root as text, got 5"
    text = "\n" + run.config.read_text()
    run.config.write_text(text.replace(f"\n{old}", f"\n{new}", 1))
    for op, use in (("train", resume), ("evaluate", lambda run: fastreid_u.evaluate(run.path, quiet=True))):
        with pytest.raises(ValueError, match=f"{op}: .*config.toml {words}"):
            use(run)


def test_settings_nested_without_end_are_named(run):
    run.config.write_text("a = " + "[" * 5000)
    with pytest.raises(ValueError, match=r"evaluate: .*config.toml must be as train wrote it, got "):
        fastreid_u.evaluate(run.path, quiet=True)

# SPDX-License-Identifier: Apache-2.0
"""What a run that goes on finds changed around it, what it saves, and what it sweeps away."""

import re
import shutil

import pytest
import torch
from PIL import Image

import fastreid_u
from fastreid_u.engine import surroundings
from fastreid_u.engine.finite import not_finite
from fastreid_u.engine.folder import RunFolder
from fastreid_u.models import build_model

TINY = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=1,
    epochs=1, workers=0, k1=8, k2=3, amp="off", eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def bitmaps(tiny_world, tmp_path_factory):
    """The tiny world as uncompressed images, all of one size."""
    world = shutil.copytree(tiny_world, tmp_path_factory.mktemp("bitmaps") / "Market-1501-v15.09.15")
    for path in [*world.rglob("*.jpg")]:
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    return world


@pytest.fixture(scope="module")
def finished(bitmaps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    fastreid_u.train("market1501", root=bitmaps, logs_dir=folder, **TINY)
    return folder


@pytest.fixture
def world(bitmaps, tmp_path):
    return shutil.copytree(bitmaps, tmp_path / "Market-1501-v15.09.15")


@pytest.fixture
def run(finished, tmp_path):
    return RunFolder(shutil.copytree(finished, tmp_path / "run"))


def resume(run, **settings):
    return fastreid_u.train(logs_dir=run.path, resume=True, quiet=True, device="cpu", **settings)


# What is around a run


def test_images_of_equal_size_and_other_contents_are_refused(run, world):
    resume(run, root=world)
    images = sorted((world / "bounding_box_train").glob("*.bmp"))
    contents = [path.read_bytes() for path in images]
    assert len({len(data) for data in contents}) == 1
    for path, data in zip(images, contents[1:] + contents[:1], strict=True):
        path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"got others in .*: training images of the same names and sizes hold other by"
    ):
        resume(run, root=world, epochs=2)


def test_a_gallery_that_was_cut_is_named(run, world):
    resume(run, root=world)
    assert "warning: the ranked images" not in run.log.read_text()
    for path in sorted((world / "bounding_box_test").glob("*.bmp"))[::2]:
        path.unlink()
    resume(run, root=world)
    assert "warning: the ranked images are others than until epoch 0: mAP before and after" in run.log.read_text()


def test_an_easier_gallery_does_not_replace_the_best_network(run, world):
    before = run.model_file("best").read_bytes()
    for path in sorted((world / "bounding_box_test").glob("0000*.bmp")):  # the distractors
        path.unlink()
    went_on = resume(run, root=world, epochs=3)
    assert max(record["mAP"] for record in went_on.records[1:]) > went_on.records[0]["mAP"], "of fewer images"
    assert run.model_file("best").read_bytes() == before
    assert went_on.records.best["epoch"] == 0


def test_a_gallery_with_other_contents_is_named(run, world):
    first, second = sorted((world / "bounding_box_test").glob("*.bmp"))[:2]
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)
    resume(run, root=world)
    assert "warning: the ranked images are others" in run.log.read_text()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: run.model_file("best").unlink(), "it is gone"),
        (lambda run: run.model_file("best").write_bytes(bytes(999)), "is not a readable safetensors file"),
    ],
)
def test_a_best_network_that_is_gone_or_damaged_is_named(run, spoil, words):
    spoil(run)
    resume(run)
    line = next(line for line in run.log.read_text().splitlines() if line.startswith("warning:"))
    assert "model_best.safetensors should be the network of epoch 0, " in line
    assert words in line


def test_settings_that_are_gone_are_named(run):
    run.config.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train: .*config.toml must be there, with the run's settings, got none"
    ):
        resume(run)


def test_another_version_or_device_is_named(run, monkeypatch):
    resume(run)
    assert "it was" not in run.log.read_text()
    monkeypatch.setattr(surroundings.torch, "__version__", "9.9")
    monkeypatch.setattr(surroundings, "package_version", lambda: "0.0.0")
    resume(run, epochs=2)
    log = run.log.read_text()
    for line in ("note: torch is 9.9, until epoch 0 it was ", "note: fastreid_u is 0.0.0, until epoch 0 it was "):
        assert log.count(line) == 1
    resume(run)
    assert run.log.read_text().count("note: torch is") == 1, "the last epoch was trained with it"


def test_the_picture_has_the_last_epoch_after_a_kill_before_it_was_drawn(run):
    whole = run.curves.read_bytes()
    run.curves.unlink()
    resume(run)
    assert run.curves.read_bytes() == whole


# What is saved


def test_weights_that_became_nan_in_the_last_step_are_not_saved(run, monkeypatch):
    """No loss shows them, and without evaluation in that epoch no figure does."""
    from fastreid_u.engine import loop

    def broken(session, epoch, targets):
        loss = fit(session, epoch, targets)
        with torch.no_grad():
            session.recipe.model.bnneck.weight[3] = torch.nan
        return loss

    fit, before = loop.fit_epoch, {path.name: path.read_bytes() for path in run.path.iterdir()}
    monkeypatch.setattr(loop, "fit_epoch", broken)
    with pytest.raises(FloatingPointError, match=r"recipe.model.bnneck.weight must be finite after epoch 1, got NaN"):
        resume(run, epochs=3, eval_step=9)
    kept = ("state.safetensors", "model_last.safetensors", "model_best.safetensors", "metrics.jsonl")
    assert all((run.path / name).read_bytes() == before[name] for name in kept)
    monkeypatch.undo()
    assert resume(run, epochs=2).last["epoch"] == 1


def test_a_file_of_weights_with_nan_is_named_and_not_called_divergence(bitmaps, tmp_path):
    weights = build_model("resnet10", weights=None, seed=5).state_dict()
    weights["backbone.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(weights, tmp_path / "start.pth")
    with pytest.raises(
        ValueError, match=r"weights must be finite, got NaN or inf.* backbone.conv1.weight of .*start.pth"
    ):
        fastreid_u.train(
            "market1501", root=bitmaps, logs_dir=tmp_path / "run", **TINY | {"weights": str(tmp_path / "start.pth")}
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda s: s.recipe.memory.features[0].fill_(torch.inf), "recipe.memory.features"),
        (lambda s: s.recipe.model.bnneck.running_var.fill_(torch.inf), "recipe.model.bnneck.running_var"),
        (lambda s: s.optimizer.state[s.optimizer.param_groups[0]["params"][0]]["exp_avg_sq"].fill_(torch.inf),
         "optimizer.0.exp_avg_sq"),
    ],
)  # fmt: skip
def test_memories_statistics_and_moments_are_looked_at_too(run, monkeypatch, spoil, name):
    from fastreid_u.engine import loop

    fit = loop.fit_epoch

    def broken(session, epoch, targets):
        loss = fit(session, epoch, targets)
        with torch.no_grad():
            spoil(session)
        return loss

    monkeypatch.setattr(loop, "fit_epoch", broken)
    with pytest.raises(FloatingPointError, match=f"train: {name} must be finite"):
        resume(run, epochs=3, eval_step=9)


def test_what_a_method_holds_infinite_from_the_start_is_its_own(run):
    from fastreid_u.recipes.cluster_contrast import ClusterContrast

    class Masked(ClusterContrast):
        name = "cluster_contrast"

        def build(self, model):
            super().build(model)
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    root = re.search(r'(?m)^root = "(.*)"$', run.config.read_text())[1]
    own = fastreid_u.train("market1501", root=root, method=Masked, logs_dir=run.path, overwrite=True, **TINY)
    assert own.last["epoch"] == 0
    assert resume(run, method=Masked, epochs=2).last["epoch"] == 1


def test_not_finite_names_the_first():
    tensors = {
        "a": torch.ones(2),
        "b": torch.tensor([1.0, torch.nan]),
        "c": torch.tensor(torch.inf),
        "d": torch.ones(0),
    }
    assert not_finite(tensors) == "b"
    assert not_finite(tensors, but={"b"}) == "c"
    assert not_finite(tensors, but={"b", "c"}) == not_finite({"i": torch.arange(3)}) == ""


# What is swept


def test_only_what_a_killed_run_left_is_swept(run):
    kept = {
        ".thesis.doc.part", ".state.safetensors.part", ".state.safetensors.x7.part", ".notes.txt.7.part", ".tmpAb12Cd",
        "state.safetensors.7.part",
    }  # fmt: skip
    for name in kept:
        (run.path / name).touch()
    (run.path / ".state.safetensors.9.part").mkdir()
    for name in (
        ".state.safetensors.7.part",
        ".config.toml.123.part",
        ".model_best.json.1.part",
        ".curves.png.22.part",
    ):
        (run.path / name).touch()
    (run.path / ".metrics.jsonl.4.part").symlink_to(run.path / ".thesis.doc.part")
    run.clean(run=False)
    hidden = {path.name for path in run.path.iterdir() if "part" in path.name or path.name.startswith(".tmp")}
    assert hidden == kept | {".state.safetensors.9.part"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "curves.png", "model_last.safetensors", "model_best.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_any_work(run, name):
    (run.path / name).unlink()
    (run.path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=rf"train: .*{name} must be a file, got a folder"):
        resume(run, epochs=2)
    assert RunFolder(run.path).state().epoch == 0


def test_a_file_in_the_place_of_the_folder_is_named(finished, tmp_path, bitmaps):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"train: logs_dir must be a folder, got the file .*run"):
        fastreid_u.train("market1501", root=bitmaps, logs_dir=tmp_path / "run", **TINY)
    assert (tmp_path / "run").read_text() == "mine"

# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read, in a whole run: named once, left out; past 5 % the run stops."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.engine.image_set import TooManyBadImages

SETTINGS = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, workers=0, iters=2, epochs=2, batch_size=16,
    num_instances=4, k1=8, k2=3, center_per_camera=True, eval_step=1, device="cpu",
)  # fmt: skip


@pytest.fixture
def world(tiny_world, tmp_path):
    """A copy of the tiny world to damage."""
    return shutil.copytree(tiny_world, tmp_path / "world")


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"not a picture"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_one_bad_image_in_each_split_is_named_once_and_left_out(world, tmp_path, how):
    dataset = load_dataset("market1501", world)
    victims = [dataset.train[5].path, dataset.query[0].path, dataset.gallery[1].path]
    # one of 12 queries is more than 5 % of the queries, but not of the ranked images, which are counted together
    for path in victims:
        damage(world / path, how)
    run = fastreid_u.train(dataset, logs_dir=tmp_path / "run", **SETTINGS)
    log = (run.folder / "log.txt").read_text()
    for path in victims:
        assert log.count(path) == 1, "named, and only once in two epochs"
    assert run.last["queries"] <= len(dataset.query) - 1
    extracted = fastreid_u.extract(run.folder, world / "bounding_box_train", device="cpu", workers=0)
    assert list(extracted.bad) == [victims[0]]
    assert torch.isnan(extracted.features[extracted.paths.index(victims[0])]).all()


def test_more_than_five_percent_stop_the_run_and_are_listed(world, tmp_path):
    dataset = load_dataset("market1501", world)
    for sample in dataset.train[:5]:
        damage(world / sample.path, "truncated")
    with pytest.raises(
        TooManyBadImages, match=rf"\d+ of {len(dataset.train)} images cannot be read, more than 5%"
    ) as stop:
        fastreid_u.train(dataset, logs_dir=tmp_path / "run", quiet=True, **SETTINGS)
    assert dataset.train[0].path in str(stop.value)


def test_an_image_that_vanishes_between_epochs_is_left_out(world, tmp_path, monkeypatch):
    from fastreid_u.engine import loop

    dataset = load_dataset("market1501", world)
    real = loop.fit_epoch

    def then_delete(*arguments, **rest):
        loss = real(*arguments, **rest)
        (world / dataset.train[3].path).unlink(missing_ok=True)
        return loss

    monkeypatch.setattr(loop, "fit_epoch", then_delete)
    run = fastreid_u.train(dataset, logs_dir=tmp_path / "run", **SETTINGS)
    assert (run.folder / "log.txt").read_text().count(dataset.train[3].path) == 1
    assert run.last["epoch"] == 1


@pytest.mark.parametrize("method", ["spcl", "cacl"])
def test_what_could_not_be_read_is_remembered_by_a_resumed_run(world, tmp_path, method):
    """Methods that extract once know in later epochs which rows of their memory are of no image."""
    dataset = load_dataset("market1501", world)
    damage(world / dataset.train[5].path, "empty")
    settings = SETTINGS | {"method": method, "eps_gap": 0.1, "eval_step": 2}
    whole = fastreid_u.train(dataset, logs_dir=tmp_path / "whole", **settings)
    fastreid_u.train(dataset, logs_dir=tmp_path / "parts", **settings | {"epochs": 1})
    parts = fastreid_u.train(dataset, logs_dir=tmp_path / "parts", resume=True, **settings)
    states = [load_file(run.folder / "state.safetensors") for run in (whole, parts)]
    assert torch.equal(states[0]["readable"], torch.arange(len(dataset.train)) != 5)
    assert states[0]["labels"][5] == -1
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_readable_image_at_all_is_named_before_batchnorm_is_calibrated(world, tmp_path):
    dataset = load_dataset("market1501", world)
    for sample in dataset.train:
        damage(world / sample.path, "text")
    with pytest.raises(TooManyBadImages, match=rf"{len(dataset.train)} of {len(dataset.train)} images") as stop:
        fastreid_u.train(dataset, logs_dir=tmp_path / "run", quiet=True, calibrate_bn=3, **SETTINGS)
    assert str(stop.value).count(": not an image") == 10


def test_without_query_and_gallery_a_bad_image_is_named_once(world, tmp_path):
    """The images that are learned from are ranked, too."""
    folder = world / "bounding_box_train"
    victim = sorted(folder.glob("*.jpg"))[4]
    odd = victim.with_name(victim.name[:-4] + "\x1b[31m\n.jpg")
    victim.rename(odd)
    damage(odd, "truncated")
    run = fastreid_u.train(folder, logs_dir=tmp_path / "run", **SETTINGS | {"epochs": 1, "calibrate_bn": 1})
    log = (run.folder / "log.txt").read_text()
    assert log.count(victim.name[:-4]) == 1
    assert "\\x1b[31m\\n.jpg (cannot be decoded" in log
    assert "\x1b" not in log


def test_files_that_end_early_are_used_on_request(world, tmp_path):
    dataset = load_dataset("market1501", world)
    path = world / dataset.train[5].path
    path.write_bytes(path.read_bytes()[:-20])
    settings = SETTINGS | {"epochs": 1, "truncated_images": True}
    run = fastreid_u.train(dataset, logs_dir=tmp_path / "run", **settings)
    assert dataset.train[5].path not in (run.folder / "log.txt").read_text()
    extract = lambda **more: fastreid_u.extract(  # noqa: E731
        run.folder, [world / dataset.train[5].path, dataset.train[6].path], device="cpu", workers=0, **more
    )
    assert extract().bad == {}, "as in training"
    assert list(extract(truncated_images=False).bad) == [dataset.train[5].path]

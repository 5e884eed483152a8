# SPDX-License-Identifier: Apache-2.0
"""The network before training: measured alone, compared with what training makes of it, and gone on from."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import fastreid_u
from fastreid_u.data import load_dataset
from fastreid_u.engine.card import outcome
from fastreid_u.engine.image_set import ImageSet
from fastreid_u.engine.records import Records

SMALL = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=2,
    workers=0, k1=8, k2=3, calibrate_bn=2, eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


@pytest.fixture
def dataset(tiny_world):
    return load_dataset("market1501", tiny_world)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than these epochs."""
    monkeypatch.setattr("fastreid_u.engine.loop.draw_curves", lambda *_, **__: None)


def records(*figures):
    """Of the given mAP, from epoch -1 on; None where a network was not evaluated."""
    return Records({"epoch": epoch, "mAP": figure} for epoch, figure in enumerate(figures, -1) if figure is not None)


def figures(run):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in run.records]


def weights(run, which="last"):
    return load_file(run.folder / f"model_{which}.safetensors")


def test_what_the_machine_decided_holds_for_the_whole_run(dataset, tmp_path, monkeypatch):
    """A resumed run, and features of its network, have the layout of its beginning, whatever the rule would be now."""
    run, first = tmp_path / "run", fastreid_u.train(dataset, logs_dir=tmp_path / "run", epochs=0, **SMALL)
    decided = first.config.channels_last
    assert isinstance(decided, bool)
    monkeypatch.setattr("fastreid_u.engine.speed._prefers_channels_last", lambda device: not decided)
    resumed = fastreid_u.train(dataset, logs_dir=run, resume=True, quiet=True, device="cpu")
    assert resumed.config.channels_last is decided
    network, about = fastreid_u.load_model(run)
    assert about["config"]["channels_last"] is decided
    kernels = network.backbone.layer1[0].conv1.weight
    assert kernels.is_contiguous(memory_format=torch.channels_last) is decided


def test_a_run_that_only_does_harm_is_told_apart_from_a_success():
    line, warning = outcome(records(0.030, 0.020, 0.025, 0.022), "test split")
    assert line == "start mAP 3.0%; last epoch 2, mAP 2.2%; best mAP 2.5% at epoch 1, on the test split"
    assert warning.startswith(
        "warning: training only did harm: no epoch reached the mAP of the network before it (3.0%)"
    )


def test_a_last_epoch_below_the_start_is_named():
    _, warning = outcome(records(0.30, 0.40, 0.25), "test split")
    assert warning.startswith("warning: the last epoch ranks worse than the network before training")


def test_a_run_that_helped_is_not_warned_of():
    assert outcome(records(0.366, 0.474, 0.512), "test split") == [
        "start mAP 36.6%; last epoch 1, mAP 51.2%; best mAP 51.2% at epoch 1, on the test split"
    ]


def test_an_unknown_start_is_named_with_the_option_that_measures_it():
    (line,) = outcome(records(None, 0.4), "test split")
    assert "start not evaluated (eval_initial=True, --eval-initial)" in line


def test_no_epochs_measure_and_save_the_network_before_training(dataset, tmp_path):
    run = fastreid_u.train(dataset, logs_dir=tmp_path, epochs=0, **SMALL)
    (record,) = run.records
    assert record == run.last
    assert record["epoch"] == -1
    assert run.best is None
    assert not (tmp_path / "model_best.safetensors").exists()
    again = fastreid_u.evaluate(tmp_path, dataset, device="cpu", workers=0, quiet=True)
    assert again["mAP"] == record["mAP"]
    rows, paths, bad = fastreid_u.extract(tmp_path, [dataset.query[0].path], device="cpu", workers=0, quiet=True)
    assert rows.shape == (1, 256)
    assert (len(paths), bad) == (1, {})
    assert "before training, on the test split; no epoch was trained" in (tmp_path / "log.txt").read_text()


def test_no_epochs_without_anything_to_rank_leave_a_network(dataset, tmp_path):
    nameless = tuple(sample._replace(pid=-1) for sample in dataset.train)
    blind = dataclasses.replace(dataset, train=nameless, query=(), gallery=(), has_pids=False)
    run = fastreid_u.train(blind, logs_dir=tmp_path, epochs=0, **SMALL)
    assert run.records == [{"epoch": -1}]
    assert fastreid_u.load_model(tmp_path)[1]["epoch"] == -1


@pytest.mark.parametrize("method", ["ice", "cacl"])
def test_a_run_of_no_epochs_goes_on_as_if_it_had_been_asked_for_more(dataset, tmp_path, method):
    settings = {**SMALL, "method": method}
    fastreid_u.train(dataset, logs_dir=tmp_path / "two", epochs=0, **settings)
    resumed = fastreid_u.train(dataset, logs_dir=tmp_path / "two", epochs=1, resume=True, method=method, device="cpu")
    unbroken = fastreid_u.train(dataset, logs_dir=tmp_path / "one", epochs=1, eval_initial=True, **settings)
    assert figures(resumed) == figures(unbroken)
    ours, theirs = weights(resumed), weights(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "resumed before epoch 0" in (tmp_path / "two" / "log.txt").read_text()


@pytest.fixture
def passes(monkeypatch):
    """The names of the passes over images, as they happen."""
    seen, real = [], ImageSet.features

    def counted(self, network, phase="extract"):
        seen.append(phase)
        return real(self, network, phase)

    monkeypatch.setattr(ImageSet, "features", counted)
    return seen


@pytest.mark.parametrize("method", ["cluster_contrast", "ice"])
def test_training_images_that_were_just_ranked_are_not_extracted_again(
    dataset, tmp_path, passes, power_cut, monkeypatch, method
):
    """The same bits come out as with two passes, and as with a resumed run, which has nothing to reuse."""
    alone = dataclasses.replace(dataset, query=(), gallery=())
    settings = {**SMALL, "method": method, "epochs": 2}
    once = fastreid_u.train(alone, logs_dir=tmp_path / "once", eval_initial=True, **settings)
    assert passes == ["evaluate"] * 3, "before training and after each epoch"

    with power_cut(1):
        fastreid_u.train(alone, logs_dir=tmp_path / "resumed", eval_initial=True, **settings)
    resumed = fastreid_u.train(alone, logs_dir=tmp_path / "resumed", resume=True, method=method, device="cpu")
    monkeypatch.setattr("fastreid_u.engine.reuse.KeptFeatures.take", lambda self, network: None)
    twice = fastreid_u.train(alone, logs_dir=tmp_path / "twice", eval_initial=True, **settings)
    for other in (resumed, twice):
        assert figures(other) == figures(once)
        theirs = weights(other)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(once).items())


def test_features_of_other_images_or_of_a_changed_network_are_not_reused(dataset, tmp_path, passes):
    from fastreid_u.recipes.cluster_contrast import ClusterContrast

    class Restless(ClusterContrast):
        name = "restless"

        def features(self, extract, epoch):
            with torch.no_grad():
                next(self.model.parameters()).data.mul_(1.5)  # a change that no version counter shows
            return extract(self.model)

    fastreid_u.train(dataset, logs_dir=tmp_path / "split", epochs=2, **SMALL)
    assert passes == ["extract", "evaluate"] * 2, "query and gallery are other images"
    passes.clear()
    some = (dataset.train[0]._replace(pid=-1), *dataset.train[1:])
    fastreid_u.train(
        dataclasses.replace(dataset, train=some, query=(), gallery=()), logs_dir=tmp_path / "some", epochs=2, **SMALL
    )
    assert passes == ["extract", "evaluate"] * 2, "images of unknown identity are trained on, not ranked"
    passes.clear()
    alone = dataclasses.replace(dataset, query=(), gallery=())
    fastreid_u.train(alone, logs_dir=tmp_path / "restless", method=Restless, epochs=2, **SMALL)
    assert passes == ["extract", "evaluate"] * 2

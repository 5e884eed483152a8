# SPDX-License-Identifier: Apache-2.0
"""What a script has set or started for its own purposes does not reach a run: default device, threads, console."""

import sys
import threading

import pytest
import torch

import fastreid_u

SMALL = dict(
    height=64, width=32, arch="resnet10", weights=None, bn_group=None, batch_size=16, num_instances=4, iters=3,
    epochs=2, k1=8, k2=3, min_samples=2, calibrate_bn=2, amp="off", eval_step=1, quiet=True, device="cpu",
)  # fmt: skip


def same(run, other):
    weights = [r.model.state_dict() for r in (run, other)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def alone(tiny_world, tmp_path_factory):
    return fastreid_u.train(tiny_world, logs_dir=tmp_path_factory.mktemp("alone") / "run", workers=0, **SMALL)


def test_a_default_device_that_is_not_the_cpu(tiny_world, tmp_path, alone):
    expected = fastreid_u.evaluate(alone.folder, workers=0, device="cpu", quiet=True)
    features = fastreid_u.extract(alone.folder, tiny_world / "query", workers=0, device="cpu").features
    torch.set_default_device("meta")  # stands for a GPU
    try:
        run = fastreid_u.train(tiny_world, logs_dir=tmp_path / "run", workers=1, **SMALL)
        assert torch.get_default_device().type == "meta"
        figures = fastreid_u.evaluate(run.folder, workers=1, device="cpu", quiet=True)
        got = fastreid_u.extract(run.folder, tiny_world / "query", workers=1, device="cpu").features
    finally:
        torch.set_default_device(None)
    assert same(run, alone)
    assert figures == expected
    assert torch.equal(got, features)


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_trainings_in_two_threads_with_workers_end_and_learn_the_same(tiny_world, tmp_path, alone):
    """Each forks workers while the other draws random numbers."""
    runs = {}

    def train(number):
        runs[number] = fastreid_u.train(tiny_world, logs_dir=tmp_path / f"run{number}", workers=1, **SMALL)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(runs[0], alone)
    assert same(runs[1], alone)


def test_no_standard_output(tiny_world, tmp_path, alone, monkeypatch):
    """As under pythonw and in services."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    settings = SMALL | {"quiet": False, "epochs": 1}
    run = fastreid_u.train(tiny_world, logs_dir=tmp_path / "run", workers=0, **settings)
    fastreid_u.evaluate(run.folder, workers=0, device="cpu")
    fastreid_u.extract(run.folder, tiny_world / "query", workers=0, device="cpu", quiet=False)
    assert (run.folder / "log.txt").stat().st_size > 0

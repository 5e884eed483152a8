# SPDX-License-Identifier: Apache-2.0
"""The script that pre-trains a small transformer: its steps on tiny worlds, and that nothing is done twice."""

import importlib
import sys
from pathlib import Path

import pytest

WORLDS = Path(__file__).parents[2] / "benchmarks" / "worlds"
pytestmark = pytest.mark.skipif(not WORLDS.is_dir(), reason="needs a source checkout around it")
WORLD = dict(train_ids=6, test_ids=4, cameras=3, images_per_camera=4, distractors=1, height=64, width=32)
SHORT = dict(height=64, width=32, workers=0, iters=2, epochs=1, batch_size=16, num_instances=4, k1=8, k2=3, eps=0.7)


def test_weights_then_two_runs_from_and_without_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm", reason="needs the extra [timm]")
    monkeypatch.syspath_prepend(str(WORLDS))
    script = importlib.import_module("person_pretraining")
    render = script.load_dataset
    monkeypatch.setattr(script, "OTHERS", {**WORLD, "seed": 200})
    monkeypatch.setattr(script, "SMALL", {**script.SMALL, **SHORT})
    monkeypatch.setattr(script, "LONG", {"lr": 1e-3})
    monkeypatch.setattr(script, "load_dataset", lambda name, **dials: render(name, tmp_path, **{**WORLD, **dials}))
    monkeypatch.setattr(sys, "argv", ["person_pretraining.py", "--logs", str(tmp_path / "logs")])
    shown = []
    for _ in range(2):
        assert script.main() == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    start = {line[:33].strip(): line[33:] for line in shown[0].splitlines()}
    assert start["random weights, at the start"] != start["person-pretrained, at the start"]
    assert {folder.name for folder in (tmp_path / "logs").iterdir()} == {
        "weights",
        "world0-person-pretrained",
        "world0-random-weights",
    }

# SPDX-License-Identifier: Apache-2.0
"""Trained features for benchmarks: made once, read by rows, refused by name."""

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs a source checkout around it")
WORLD = dict(train_ids=6, test_ids=2, cameras=3, images_per_camera=4, distractors=0, height=64, width=32)
SHORT = dict(
    height=64, width=32, workers=0, iters=2, epochs=1, batch_size=16, num_instances=4, k1=8, k2=3, eps=0.7,
    calibrate_bn=2,
)  # fmt: skip


@pytest.fixture
def module(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("FASTREID_U_CACHE", str(tmp_path))
    found = importlib.import_module("trained_features")
    monkeypatch.setattr(found, "KINDS", {256: found.Kind(20, "resnet10", SHORT)})
    monkeypatch.setattr(found, "LEARNT", WORLD)
    monkeypatch.setattr(found, "OTHERS", {**WORLD, "test_ids": 0, "seed": 1})
    return found


def test_makes_once_and_reads_rows(module):
    with pytest.raises(FileNotFoundError, match=r"make them: python benchmarks/trained_features\.py"):
        module.load(5, 256)
    path = module.make(256, quiet=True)
    made = path.stat().st_mtime_ns
    assert module.make(256) == path
    assert path.stat().st_mtime_ns == made
    rows = module.load(20, 256)
    assert (rows.shape, rows.dtype) == ((20, 256), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(module.load(7, 256), rows[:7])
    assert len(np.unique(rows, axis=0)) == 20


def test_refuses_other_sizes(module):
    with pytest.raises(ValueError, match=r"trained_features: d must be one of 256, got 300"):
        module.load(5, 300)
    for n in (0, 21):
        with pytest.raises(ValueError, match=rf"n must lie in \[1, 20\] for d = 256, got {n}"):
            module.load(n, 256)

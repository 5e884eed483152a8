# SPDX-License-Identifier: Apache-2.0
"""The claims script: every arm is a method with settings it knows; runs are not repeated; the table is honest."""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastreid_u.data.synthetic import SyntheticConfig
from fastreid_u.recipes import get_method

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "worlds" / "claims.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs a source checkout around it")


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module
    spec.loader.exec_module(module)
    return module


def test_every_arm_is_a_method_with_settings_that_it_knows(claims):
    for name, claim in claims.CLAIMS.items():
        SyntheticConfig(**claim.dials)
        assert len(claim.arms) >= 2, name
        lengths = set()
        for position, arm in enumerate(claim.arms.values()):
            assert arm.beside in (None, *list(claim.arms)[:position])
            config = get_method(arm.method).Config.for_dataset("synthetic", **arm.settings)
            lengths.add(config.epochs)
        assert len(lengths) == 1, f"{name}: arms of different length"


def options(tmp_path, **changes):
    return argparse.Namespace(epochs=None, out=tmp_path / "out", logs=tmp_path / "logs", **changes)


def test_a_run_leaves_one_file_and_is_not_repeated(claims, tmp_path, monkeypatch):
    asked = []

    trained = SimpleNamespace(
        last={"mAP": 0.5, "top1": 0.6, "ari": 0.7, "clusters": 8, "unclustered": 0.1},
        records=[{"seconds": {"fit": 2.0}}, {"seconds": {"fit": 3.0, "label": 1.0}}],
        config=get_method("cluster_contrast").Config.for_dataset("synthetic"),
    )
    monkeypatch.setattr(claims.fastreid_u, "train", lambda *given, **settings: asked.append(settings) or trained)
    for _ in range(2):
        claims.run("gem", "average", 3, options(tmp_path))
    assert len(asked) == 1
    assert asked[0]["pooling_type"] == "avg"
    assert (asked[0]["seed"], asked[0]["data"], asked[0]["resume"]) == (3, {"seed": 3}, False)
    (file,) = (tmp_path / "out" / "gem").glob("*.json")
    record = json.loads(file.read_text())
    assert (record["mAP"], record["seconds"], record["centred"]) == (0.5, 6, True)
    (tmp_path / "logs" / "source" / "spcl-with-source-seed1").mkdir(parents=True)
    (tmp_path / "logs" / "source" / "spcl-with-source-seed1" / "state.safetensors").write_bytes(b"")
    claims.run("source", "SpCL with source", 1, options(tmp_path))
    assert asked[1]["resume"], "a run that was broken off goes on"
    assert asked[1]["source_data"] == {"shift": 0.5, "seed": 51}


def test_the_table_shows_mean_spread_and_what_was_not_run(claims, tmp_path):
    (tmp_path / "gem").mkdir()
    base = {"top1": 0.8, "ari": 0.9, "centred": True}
    for seed, (average, gem) in enumerate([(0.80, 0.75), (0.84, 0.77), (0.82, 0.76)]):
        for arm, value in (("average", average), ("GeM", gem)):
            record = {**base, "arm": arm, "seed": seed, "mAP": value}
            (tmp_path / "gem" / f"{arm}-{seed}.json").write_text(json.dumps(record))
        shown = claims.table(tmp_path, "gem")
        if seed == 1:  # -5 and -7 may still be chance
            assert "| GeM | on | 2 | 76.0 ± 1.4 | 80.0 ± 0.0 | 0.90 | -6.0 ± 1.4 to average |" in shown, (
                "an honest table"
            )
    assert "| GeM | on | 3 | 76.0 ± 1.0 | 80.0 ± 0.0 | 0.90 | **-6.0 ± 1.0** to average |" in shown
    assert "| eps falling | | 0 | not run |" in claims.table(tmp_path, "eps")
    claims.draw(tmp_path, tmp_path / "claims.png")
    assert (tmp_path / "claims.png").stat().st_size > 10_000


def test_the_page_is_what_the_files_say(claims):
    text = claims.PAGE.read_text(encoding="utf-8")
    assert claims.page(text, claims.RESULTS) == text, "run benchmarks/worlds/claims.py --write"
    for file in claims.RESULTS.glob("*/*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        claim = claims.CLAIMS[record["claim"]]
        arm = claim.arms[record["arm"]]
        assert record["method"] == arm.method, file
        assert record["settings"] == {**arm.settings, "seed": record["seed"]}, file
        assert record["dials"] == {**claim.dials, "seed": record["seed"]}, file


def test_slugs_do_not_collide(claims):
    for claim in claims.CLAIMS.values():
        assert len({claims._slug(arm) for arm in claim.arms}) == len(claim.arms)
    assert dataclasses.is_dataclass(claims.Claim)

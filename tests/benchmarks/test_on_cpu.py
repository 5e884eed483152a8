# SPDX-License-Identifier: Apache-2.0
"""``make bench``: the tiny form of an epoch from end to end, and the tables of docs/benchmarks.md."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs a source checkout around it")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cpu_report")


def test_a_tiny_epoch_from_end_to_end(tmp_path, report):
    pytest.importorskip("faiss", reason="the published search")
    command = [
        sys.executable,
        "-P",
        str(BENCHMARKS / "on_cpu.py"),
        "--tiny",
        "--results",
        str(tmp_path / "cpu"),
        "epoch",
    ]
    environment = os.environ | {
        "FASTREID_U_COMMIT": "abc", "FASTREID_U_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(BENCHMARKS),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "cpu" / "epoch.json").read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    case = json.loads(text)["cases"]["bench_epoch"]
    (figures,) = case["figures"].values()
    assert (case["status"], case["commit"], case["skipped"]) == ("ok", "abc", [])
    assert figures["equality"]["labels equal"]
    assert figures["equality"]["features differ by"] <= 1e-4
    assert list(figures["phases"]) == ["extract", "label", "fit", "evaluate", "whole epoch"]
    assert figures["settings"]["clusters"] > 1
    assert figures["held back by"] in figures["phases"]
    assert {"batch_size", "iters", "threads", "train images"} <= set(figures["settings"])
    table = report.tables(tmp_path / "cpu")
    assert "| whole epoch |" in table
    assert "| of these: search |" in table


def test_refuses_what_is_not_there():
    command = [sys.executable, str(BENCHMARKS / "on_cpu.py")]
    for arguments, message in ((["everything"], "name must be one of"), (["--tiny"], "results must be another folder")):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr


def test_page_is_what_the_files_say(report, tmp_path):
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert report.page(text, report.RESULTS) == text, "run benchmarks/cpu_report.py"
    assert report.NOTHING in report.page(text, tmp_path)


def test_tables_of_made_up_files(report, tmp_path):
    def store(name, figures, **more):
        case = {"status": "ok", "seconds": 3.0, "commit": "abc", "date": "2030-01-02T03:04:05", "figures": figures}
        content = {"machine": {"cpu": "A 1", "cores": 2}, "cases": {f"bench_{name}": case | more}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    rows = {
        f"g[{n}]": {"group": "g", "ms": n**1.5, "step": "search", "rows": n, "peak_bytes": 100 * n}
        for n in (5_000, 10_000, 50_000)
    }
    store("growth", rows)
    store("knn", {"bench_knn[a]": {"group": "knn N=5", "ms": 0.123456, "bytes": 10}}, skipped=["cuML needs a GPU"])
    made = report.tables(tmp_path)
    assert "### growth\n\ncpu A 1, cores 2. Commit abc, 2030-01-02, ok." in made
    assert "search: time grows as N^1.50, memory as N^1.00." in made
    assert "| search | 5,000 | 354 | 0.5 |" in made
    assert "| knn N=5 | bench_knn[a] | 0.1235 | bytes 10 |" in made
    assert "Skipped: cuML needs a GPU." in made

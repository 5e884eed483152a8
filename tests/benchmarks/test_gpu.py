# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` without a GPU: its bookkeeping on made-up cases, and its measurements on tiny shapes."""

import dataclasses
import fcntl
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs a source checkout around it")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("FASTREID_U_COMMIT", "abc")
    return importlib.import_module("gpu.__main__")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu.report")


@pytest.fixture
def options(gpu, tmp_path):
    return gpu.Options(results=tmp_path / "results", limit=600, again=False, dry_run=True, target=None)


def script(gpu, name, code):
    return gpu.Case(name, [sys.executable, "-c", code], gpu.last_json)


def stored(options, stage="stage"):
    return json.loads((options.results / f"{stage}.json").read_text())["cases"]


def test_writes_what_a_case_found(gpu, options):
    case = script(gpu, "one", "print('noise'); print('{\"ms\": 2.5}')")
    assert gpu.run_stage("stage", [case], options)
    record = stored(options)["one"]
    assert (record["status"], record["figures"], record["commit"]) == ("ok", {"ms": 2.5}, "abc")
    assert record["command"].startswith("python -c")
    assert record["date"].startswith("20")
    machine = json.loads((options.results / "stage.json").read_text())["machine"]
    assert machine["torch"] == torch.__version__


def test_goes_on_where_it_stopped(gpu, options, tmp_path, monkeypatch, capsys):
    """What ended well at this commit is kept; what failed, ran out of time or is of another commit runs."""
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); print('{{}}')"
    cases = [script(gpu, "good", code), script(gpu, "bad", "raise SystemExit('out of luck')")]
    assert not gpu.run_stage("stage", cases, options)
    assert "out of luck" in capsys.readouterr().out
    assert stored(options)["bad"]["status"] == "failed"
    cases[1] = script(gpu, "bad", "print('{}')")
    assert gpu.run_stage("stage", cases, options)
    assert "kept from" in capsys.readouterr().out
    assert count.read_text() == "x"
    assert gpu.run_stage("stage", cases, dataclasses.replace(options, again=True))
    assert count.read_text() == "xx"
    monkeypatch.setenv("FASTREID_U_COMMIT", "def")
    assert gpu.run_stage("stage", cases, options)
    assert count.read_text() == "xxx"


def _locked(file):
    """Whether the lock could be had, which its owner's death frees."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_stops_at_its_limit_and_takes_children_along(gpu, options, tmp_path, capsys):
    held = tmp_path / "held"  # locked for as long as the child lives
    child = f"import fcntl, time; file = open({str(held)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    cases = [script(gpu, "quick", "print('{}')"), script(gpu, "long", code), script(gpu, "last", "print('{}')")]
    assert gpu.run_stage("stage", cases[:1], options)  # before the clock runs: a busy machine may need seconds for it
    assert not gpu.run_stage("stage", cases, dataclasses.replace(options, limit=3))
    assert {name: case["status"] for name, case in stored(options).items()} == {"quick": "ok", "long": "out of time"}
    assert "last                         not reached in 3 s" in capsys.readouterr().out
    with held.open("w") as file:
        deadline = time.monotonic() + 60
        while not _locked(file):
            assert time.monotonic() < deadline, "the child has outlived the case"
            time.sleep(0.05)
    assert gpu.run_stage("stage", [cases[0], script(gpu, "long", "print('{}')"), cases[2]], options)


def test_a_case_without_figures_has_failed(gpu, options):
    assert not gpu.run_stage("stage", [script(gpu, "silent", "")], options)
    assert stored(options)["silent"]["status"] == "failed"


def test_reads_what_the_tools_print(gpu):
    assert gpu.pytest_counts("2 failed, 31 passed, 4 skipped in 5.2s") == {"failed": 2, "passed": 31, "skipped": 4}
    assert gpu.sanitizer_errors("========= ERROR SUMMARY: 3 errors") == {"errors": 3}
    more = "\n========= ERROR SUMMARY: 2742 errors were not printed. Use --print-limit option to adjust the number of"
    assert gpu.sanitizer_errors(f"========= ERROR SUMMARY: 2752 errors{more}") == {"errors": 2752}
    assert gpu.sanitizer_errors("========= ERROR SUMMARY: 1 error") == {"errors": 1}
    for count in (0, 3):
        line = f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)"
        assert gpu.sanitizer_errors(line) == {"errors": count}
    summary = "========= ERROR SUMMARY: 7 errors"
    torchs = "=========     at void at::native::_scatter_kernel<float>(T1 *)+0x10 in ScatterGather.cu:5"
    assert gpu.sanitizer_errors(f"{torchs}\n{summary}") == {"errors": 7}
    for at in (
        "    at void fastreid_u::each_crew_kernel<fastreid_u::Bridge>(long, T1)+0x10",
        "    at _filter_kernel+0x3440 in knn.py:42",
        "Error: Race reported between Write access at _order_kernel+0x10 in knn.py:9",
    ):
        with pytest.raises(ValueError, match="7 errors, 1 lines name kernels of this library"):
            gpu.sanitizer_errors(f"{torchs}\n========= {at}\n{summary}")
    with pytest.raises(ValueError, match="no summary"):  # so the case has failed
        gpu.sanitizer_errors("Error: Target application terminated before first instrumented API call")
    row = "fastreid_u 0.1.0\n  yes  _C cuda      DBSCAN on the GPU\n  no   faiss        optional: pip install\n"
    assert gpu.capabilities(row) == {"_C cuda": "DBSCAN on the GPU", "faiss": None}
    shown = subprocess.run([sys.executable, "-m", "fastreid_u"], capture_output=True, text=True, check=True).stdout
    assert {"python", "torch", "gpu", "_C cuda", "faiss"} <= set(gpu.capabilities(shown))
    assert [gpu.folder_name(name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-40GB")] == ["h200", "a100-sxm4-40gb"]


def test_a_killed_benchmark_leaves_what_it_measured(gpu, options, tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_functions = bench_*\n")
    (tmp_path / "bench_two.py").write_text(
        "import os\n"
        "def bench_quick(benchmark): benchmark.pedantic(int)\n"
        "def bench_killed(benchmark): os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setattr(gpu, "BENCHMARKS", tmp_path)
    full = dataclasses.replace(options, dry_run=False)
    stale = gpu.scratch(full) / "bench_two.json"
    stale.write_text('{"benchmarks": [{"name": "of an older run"}]}')
    (case,) = gpu.kernels(full)
    assert not stale.exists()
    case = dataclasses.replace(case, environment={"PYTHONPATH": str(ROOT / "benchmarks")})
    assert not gpu.run_stage("kernels", [case], options)
    record = stored(options, "kernels")["bench_two"]
    assert (record["status"], list(record["figures"])) == ("failed", ["bench_quick"])


def test_stages_cover_the_repository(gpu, options):
    """Every benchmark and every file of kernel tests or with a GPU test is a case; nothing is listed by hand."""
    full = dataclasses.replace(options, dry_run=False)
    assert {case.name for case in gpu.kernels(full)} == {f.stem for f in (ROOT / "benchmarks").glob("bench_*.py")}
    tests = {case.name for case in gpu.test(full)}
    assert {f"kernels/{f.stem}" for f in (ROOT / "tests" / "kernels").glob("test_*.py")} <= tests
    assert {"kernels/test_step", "kernels/test_knn", "ops/test_jaccard", "ops/test_dbscan", "ops/test_rerank"} <= tests
    assert not any(name.startswith(("house/", "benchmarks/")) for name in tests)
    assert {case.name for case in gpu.sanitizer(full)} == {"plain", *gpu.TOOLS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants missing")
def test_says_that_there_is_no_gpu():
    done = subprocess.run(["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no GPU: torch finds no CUDA device or driver" in done.stderr
    dry = ["make", "--dry-run", "gpu-kernels", "PYTHON=python3"]
    assert "benchmarks/gpu kernels" in subprocess.run(dry, cwd=ROOT, capture_output=True, text=True).stdout


def test_dry_run_from_end_to_end(tmp_path):
    """All stages in tiny, then again: nothing is run twice."""
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "gpu"), "--dry-run", "--results", str(tmp_path)]
    environment = os.environ | {"FASTREID_U_COMMIT": "abc", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "dry-run").glob("*.json")}
    cases = {stage: list(stored["cases"]) for stage, stored in files.items()}
    assert cases == {
        "build": ["probe"], "test": ["kernels/test_step"], "sanitizer": ["plain"], "ceilings": ["copy", "products"],
        "kernels": ["bench_rerank"], "train": ["render", "network", "cluster_contrast"],
    }  # fmt: skip
    assert {case["status"] for stored in files.values() for case in stored["cases"].values()} == {"ok"}
    lines = done.stdout.splitlines()
    assert "| stage | case | ended | seconds | figures |" in lines
    assert [line for line in lines if line.startswith("| ceilings | products | ok |") and "fp16 TFLOP/s" in line]
    assert [line for line in lines if line.startswith("| rerank tiny") and "peak_bytes" in line]
    assert [line for line in lines if "50 x 200 steps" in line]
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stdout.count("kept from")) == (0, 9)


EVERY_KERNEL = r"""
import glob, re, sys
import torch
from triton.runtime.interpreter import GridExecutor
from fastreid_u.ops import _dispatch
from gpu.smallest import smallest

ran, launch = set(), GridExecutor.__call__
def recorded(self, *args, **kwargs):
    ran.add(self.fn.__name__)
    return launch(self, *args, **kwargs)
GridExecutor.__call__ = recorded
_dispatch.PREFERENCE = {"cpu": ("triton", "cpp")}
smallest(torch.device("cpu"))
files = glob.glob(sys.argv[1], recursive=True)
names = {name for file in files for name in re.findall(r"def (\w+_kernel)\(", open(file).read())}
print(len(names), "never ran:", sorted(names - ran))
"""


def test_the_sanitizer_sees_every_triton_kernel():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-c", EVERY_KERNEL, str(ROOT / "kernels" / "**" / "*.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, never = done.stdout.splitlines()[-1].split(" never ran: ")
    assert int(count) > 20
    assert never == "[]"


def test_unknown_stage_is_refused():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu"), "everything"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "stage must be one of build, test, sanitizer, ceilings, kernels, train, got everything" in done.stderr


def test_page_is_what_the_files_say(report, tmp_path):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert report.page(page, ROOT / "benchmarks" / "results") == page, "run benchmarks/gpu/report.py"
    assert report.NOTHING in report.page(page, tmp_path / "none")
    record = {"status": "ok", "seconds": 3.0, "commit": "abc", "date": "2030-01-02T03:04:05", "figures": {}}
    found = {"bench[a]": {"group": "knn N=5", "ms": 0.123456, "bytes": 10, "share of roofline": 0.5}}
    for stage, figures in (("ceilings", {"TB/s": 3.14159}), ("kernels", found)):
        content = {"machine": {"gpu": "A 1", "torch": "9"}, "cases": {"c": {**record, "figures": figures}}}
        (tmp_path / "a-1").mkdir(exist_ok=True)
        (tmp_path / "a-1" / f"{stage}.json").write_text(json.dumps(content))
    made = report.page(page, tmp_path)
    assert "### a-1\n\n**A 1**: torch 9\nCommit abc; 2030-01-02." in made
    assert "| ceilings | c | ok | 3 | TB/s 3.142 |" in made
    assert "| knn N=5 | bench[a] | 0.1235 | bytes 10, share of roofline 0.5 |" in made
    assert report.page(made, tmp_path) == made

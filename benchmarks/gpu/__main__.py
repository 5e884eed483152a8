# SPDX-License-Identifier: Apache-2.0
"""Everything there is to measure on a CUDA machine, in stages of at most nine minutes. Needs no network.

    make gpu                                    # all stages, then one table
    make gpu-kernels                            # one of build, test, sanitizer, ceilings, kernels, train
    python benchmarks/gpu kernels train         # the same by hand
    python benchmarks/gpu --again ceilings      # anew, though it was measured at this commit
    python benchmarks/gpu --target DIR          # install into DIR where the environment cannot be written
    python benchmarks/gpu --dry-run             # tiny shapes on a CPU: shows that the stages run, measures nothing

A stage is a list of cases, each a process of its own. What a case found is written to
``benchmarks/results/<gpu>/<stage>.json`` when it ends, so a stage that ran out of time goes on where it stopped: cases
that ended well at the same commit are kept. docs/benchmarks.md explains the files; report.py makes its tables.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCHMARKS, ROOT = HERE.parents[:2]
LIMIT = 540  # seconds a stage
BESIDE = {"PYTHONPATH": str(BENCHMARKS)}  # scripts here import each other, as gpu.<name>
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PYTEST = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q"]
# a test with the mark, or one that runs on the CPU and on the GPU by the fixture ``device``
NEEDS_GPU = re.compile(r"pytest\.mark\.gpu|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
# without the options in pyproject.toml that need pytest-benchmark, which need not be there
PLAIN = ["-o", "addopts=--import-mode=importlib -rs"]


@dataclass(frozen=True)
class Options:
    results: Path  # folder of this GPU
    limit: float
    again: bool
    dry_run: bool
    target: Path | None


@dataclass(frozen=True)
class Case:
    """A process to run: its command, how to read what it found from its output, and what its environment adds."""

    name: str
    command: list[str]
    read: Callable[[str], dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)


def build(options: Options) -> list[Case]:
    """Install from this tree, with CUDA, and show what the installed package finds."""
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    install += ["--target", str(options.target), "--upgrade", "."] if options.target else ["-e", "."]
    cases = [Case("install", install, lambda _: {}, {"FASTREID_U_CUDA": "ON"})]
    probe = Case("probe", [sys.executable, "-P", "-m", "fastreid_u"], capabilities)
    return [probe] if options.dry_run else [*cases, probe]


def test(options: Options) -> list[Case]:
    """The tests that need a GPU, and those of the kernels, which run compiled here instead of interpreted."""
    tests = ROOT / "tests"
    files = {f.relative_to(tests).with_suffix("").as_posix(): f for f in sorted(tests.rglob("test_*.py"))}
    chosen = [name for name, f in files.items() if name.startswith("kernels/") or NEEDS_GPU.search(f.read_text())]
    if options.dry_run:
        chosen = [name for name in chosen if name == "kernels/test_step"]
    only = ["-m", "gpu"] if options.dry_run else []  # which no CPU runs: soon done
    return [Case(name, [*PYTEST, *PLAIN, *only, str(files[name])], pytest_counts) for name in chosen]


def sanitizer(options: Options) -> list[Case]:
    """Every kernel on its smallest shapes: as it is (which also fills Triton's cache), then under each tool."""
    command = [sys.executable, "-P", str(HERE / "measure.py"), *(["--tiny"] if options.dry_run else []), "smallest"]
    cases = [Case("plain", command, last_json, BESIDE)]
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if options.dry_run:
        return cases
    if program is None:
        reason = "import sys; sys.exit('compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin')"
        return [*cases, *(Case(tool, [sys.executable, "-c", reason], last_json) for tool in TOOLS)]
    flags = ["--target-processes", "application-only", "--print-limit", "1000"]  # what is not printed is not judged
    separate = {**BESIDE, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation: overruns are seen
    return [*cases, *(Case(t, [program, "--tool", t, *flags, *command], sanitizer_errors, separate) for t in TOOLS)]


def ceilings(options: Options) -> list[Case]:
    """What this very machine reaches in plain copies and products of matrices: the roof that kernels are held to."""
    return [measured(name, options) for name in ("copy", "products")]


def kernels(options: Options) -> list[Case]:
    """Every ``bench_*.py``: equality first, then the clock. Published algorithms run at N <= 12,936 only."""
    files = sorted(BENCHMARKS.glob("bench_*.py"))
    if options.dry_run:
        files = [f for f in files if f.stem == "bench_rerank"]
    cases = []
    for f in files:
        out = scratch(options) / f"{f.stem}.json"
        out.unlink(missing_ok=True)  # a run that is killed early must not be given an older one's figures
        command = [*PYTEST, *PLAIN, "-p", "no:benchmark", "-p", "gpu.stopwatch", f"--stopwatch-json={out}", str(f)]
        command += ["-k", "tiny"] if options.dry_run else []
        cases.append(Case(f.stem, command, lambda _, out=out: benchmark_figures(out), BESIDE))
    return cases


def train(options: Options) -> list[Case]:
    """Two epochs of Cluster Contrast at the size of Market-1501 on rendered people, beside the bare network's rate."""
    return [measured(name, options, scratch(options)) for name in ("render", "network", "cluster_contrast")]


STAGES: dict[str, Callable[[Options], list[Case]]] = {
    stage.__name__: stage for stage in (build, test, sanitizer, ceilings, kernels, train)
}


def measured(name: str, options: Options, *arguments: Path) -> Case:
    tiny = ["--tiny"] if options.dry_run else []
    command = [sys.executable, "-P", str(HERE / "measure.py"), *tiny, name, *map(str, arguments)]
    return Case(name, command, last_json, BESIDE)


def scratch(options: Options) -> Path:
    """Where cases leave what is not a result; not under version control."""
    folder = ROOT / "build" / "gpu" / ("dry-run" if options.dry_run else "")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def last_json(output: str) -> dict[str, Any]:
    return json.loads(output.strip().splitlines()[-1])


def capabilities(output: str) -> dict[str, Any]:
    """``python -m fastreid_u`` prints "yes" or "no", a name and a detail a line."""
    rows = (re.match(r" *(yes|no) +(\S+(?: cuda)?) +(.*)", line) for line in output.splitlines())
    return {row[2]: row[3] if row[1] == "yes" else None for row in rows if row}


def pytest_counts(output: str) -> dict[str, Any]:
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}


def sanitizer_errors(output: str) -> dict[str, Any]:
    """The total, torch's included: initcheck does not follow the sums and sorts of CUB. Ours are a failure.

    A second line like the summary counts what was not printed. Without a summary the tool saw nothing.
    """
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed)\b(?! were)", output)
    if found is None:
        raise ValueError("compute-sanitizer printed no summary")
    ours = re.findall(r"^=+ .*\bat (?:void )?(?:fastreid_u::|_\w+_kernel\b).*", output, re.MULTILINE)
    if ours:
        raise ValueError(f"{found[1]} errors, {len(ours)} lines name kernels of this library: {ours[0].strip('= ')}")
    return {"errors": int(found[1])}


def benchmark_figures(path: Path) -> dict[str, Any]:
    """By benchmark: the median in milliseconds and its ``extra_info``."""
    return {
        row["name"]: {"group": row["group"], "ms": row["stats"]["median"] * 1e3, **row["extra_info"]}
        for row in json.loads(path.read_text())["benchmarks"]
    }


def run_case(case: Case, seconds: float, options: Options) -> dict[str, Any]:
    """Run it for at most ``seconds``, everything that it started included; the record that goes into the file."""
    environment = os.environ | case.environment
    paths = [str(options.target or ""), case.environment.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            case.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
            status = "ok" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read()
    log_file = scratch(options) / f"{case.name}.log"  # a test's name has a folder in it
    log_file.parent.mkdir(exist_ok=True)
    log_file.write_text(output)  # whole: of a sanitizer's report the head matters
    record = {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python" if part == sys.executable else part for part in case.command]).replace(
            f"{ROOT}/", ""
        ),
        "figures": {},
    }
    try:
        record["figures"] = case.read(output)
    except (ValueError, IndexError, KeyError, OSError) as error:  # a case that failed may have left nothing to read
        record["status"] = "failed" if status == "ok" else status
        output += f"\nno figures: {error}"
    if record["status"] != "ok":
        record["output"] = output.replace(f"{ROOT}/", "").splitlines()[-30:]
    return record


def run_stage(name: str, cases: list[Case], options: Options) -> bool:
    """Run the cases that are not done; True if all of them have ended well by now."""
    path = options.results / f"{name}.json"
    stored = json.loads(path.read_text()) if path.is_file() else {"cases": {}}
    stored["machine"] = machine(options.dry_run)
    deadline = time.monotonic() + options.limit
    for case in cases:
        known = stored["cases"].get(case.name, {})
        if known.get("status") == "ok" and known.get("commit") == commit() and not options.again:
            print(f"{name:10} {case.name:28} kept from {known['date']}", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < 1:
            print(f"{name:10} {case.name:28} not reached in {options.limit:g} s; the same command goes on", flush=True)
            return False
        record = stored["cases"][case.name] = run_case(case, left, options)
        write(path, stored)
        print(f"{name:10} {case.name:28} {record['status']} after {record['seconds']} s", flush=True)
        if record["status"] != "ok":
            print(*record["output"], sep="\n", flush=True)
    ends = [stored["cases"].get(case.name, {}).get("status") for case in cases]
    return all(end == "ok" for end in ends)


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def machine(dry_run: bool) -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    import torch

    about: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    about["gpu"] = "none (dry run)" if dry_run else torch.cuda.get_device_name()
    command = shutil.which("nvidia-smi")
    if command and not dry_run:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return about


def commit() -> str:
    """The commit that is measured; $FASTREID_U_COMMIT where the tree is a copy without its history."""
    if name := os.environ.get("FASTREID_U_COMMIT"):
        return name
    if shutil.which("git") is None:
        return "unknown"
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode != 0:
        return "unknown"
    changed = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/benchmarks.md"]
    dirty = subprocess.run(changed, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return head.stdout.strip() + ("+changes" if dirty else "")


def folder_name(gpu: str) -> str:
    """ "NVIDIA H200" to "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"default: all of {', '.join(STAGES)}")
    parser.add_argument("--again", action="store_true", help="measure again what was measured at this commit")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, results in a scratch folder")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a stage may take (default %(default)s)")
    parser.add_argument("--results", type=Path, help="default benchmarks/results, or build/gpu/results for a dry run")
    parser.add_argument("--target", type=Path, help="install into this folder instead of the environment")
    given = parser.parse_args(arguments)
    for stage in given.stages:
        if stage not in STAGES:
            parser.error(f"stage must be one of {', '.join(STAGES)}, got {stage}")

    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print("no GPU: torch finds no CUDA device or driver; --dry-run shows the stages on a CPU", file=sys.stderr)
        return 2
    results = given.results or (ROOT / "build" / "gpu" / "results" if given.dry_run else BENCHMARKS / "results")
    gpu = "dry-run" if given.dry_run else folder_name(torch.cuda.get_device_name())
    target = given.target.resolve() if given.target else None
    options = Options((results / gpu).resolve(), given.limit, given.again, given.dry_run, target)

    well = [run_stage(stage, STAGES[stage](options), options) for stage in given.stages or STAGES]
    table = [sys.executable, str(HERE / "report.py"), "--print", str(options.results)]
    print(subprocess.run(table, capture_output=True, text=True, check=True).stdout, flush=True)
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())

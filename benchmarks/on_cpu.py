# SPDX-License-Identifier: Apache-2.0
"""Every benchmark on this machine's CPU, its figures as JSON, and the tables of docs/benchmarks.md made anew.

    make bench                                # all of them, a process each
    python benchmarks/on_cpu.py epoch growth  # bench_epoch.py and bench_growth.py
    python benchmarks/on_cpu.py --tiny epoch  # its smallest form; needs --results

What a benchmark found is written to ``benchmarks/results/cpu/<name>.json`` when it ends, with what it skipped and why.
The trained networks and features that some of them want are made first where the cache has none.
"""

import argparse
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import cpu_report
from gpu.__main__ import BENCHMARKS, BESIDE, PLAIN, PYTEST, ROOT, Case, Options, benchmark_figures, run_case, write

RESULTS = BENCHMARKS / "results" / "cpu"
TRAINED = ("epoch", "growth")  # those that want trained_features.py
PACKAGES = ("torch", "torchvision", "numpy", "numba", "scikit-learn", "faiss-cpu")
LIMIT = 1200  # seconds a benchmark


def machine() -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpus.read_text(), re.MULTILINE) if cpus.is_file() else None
    about = {"cpu": found[1] if found else platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return about | {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def skipped(output: str) -> list[str]:
    """Reasons that pytest printed, each once."""
    return sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", output, re.MULTILINE)))


def measured(name: str, results: Path, limit: float, tiny: bool) -> bool:
    """Run one benchmark and write what it found; True if it ended well."""
    options = Options(results, limit, again=True, dry_run=tiny, target=None)
    out = ROOT / "build" / "cpu" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    command = [*PYTEST, *PLAIN, "-p", "no:benchmark", "-p", "gpu.stopwatch", f"--stopwatch-json={out}"]
    command += [str(BENCHMARKS / f"bench_{name}.py"), *(["-k", "tiny"] if tiny else ["-k", "not tiny"])]
    reasons: list[str] = []

    def read(output: str) -> dict[str, Any]:
        reasons.extend(skipped(output))
        return benchmark_figures(out)

    record = run_case(Case(f"bench_{name}", command, read, BESIDE), limit, options) | {"skipped": reasons}
    write(results / f"{name}.json", {"machine": machine(), "cases": {f"bench_{name}": record}})
    print(f"{name:20} {record['status']} after {record['seconds']} s", *reasons, sep="\n    ", flush=True)
    if record["status"] != "ok":
        print(*record["output"], sep="\n", flush=True)
    return record["status"] == "ok"


def main(arguments: list[str] | None = None) -> int:
    names = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files go; elsewhere, no page")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a benchmark may take (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the cases called tiny, to see that they run")
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in names:
            parser.error(f"name must be one of {', '.join(names)}, got {name}")
    if given.tiny and given.results == RESULTS:
        parser.error("results must be another folder for --tiny, got the default")
    chosen = given.names or names
    if not given.tiny and set(chosen) & set(TRAINED):
        import trained_features

        for d in trained_features.KINDS:
            trained_features.make(d)
    well = [measured(name, given.results.resolve(), given.limit, given.tiny) for name in chosen]
    if given.results == RESULTS:
        cpu_report.main()
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())

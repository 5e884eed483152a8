# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/benchmarks.md from benchmarks/results/cpu/*.json, so that no figure is ever typed.

python benchmarks/cpu_report.py
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.report import words

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results" / "cpu"
BEGIN, END = "<!-- made by benchmarks/cpu_report.py: begin -->", "<!-- end of the CPU's -->"
NOTHING = "Not measured yet: `benchmarks/results/cpu/` has no file."


def epoch(figures: dict[str, Any]) -> Iterator[str]:
    """Seconds by phase and by part, ours beside the published pipeline."""
    for name, row in figures.items():
        yield from (f"`{name}`: {words(row['settings'])}.", "")
        yield from ("| phase | published, s | ours, s | ratio | ours in the first epoch, s |", "|---|---|---|---|---|")
        for phase, s in row["phases"].items():
            first = f"{s['ours, first']:.3g}"
            yield f"| {phase} | {s['published']:.3g} | {s['ours']:.3g} | {s['published'] / s['ours']:.2f} | {first} |"
        for part, s in row["parts"].items():
            yield f"| of these: {part} | {s['published']:.3g} | {s['ours']:.3g} | {s['published'] / s['ours']:.2f} | |"
        yield from ("", f"The phase that takes most of ours: {row['held back by']}. {words(row['equality'])}.", "")


def growth(figures: dict[str, Any]) -> Iterator[str]:
    """Time and memory by rows, and the exponents fitted to them."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(figures.values(), key=lambda row: row["rows"]):
        steps.setdefault(row["step"], []).append(row)
    yield from ("| step | rows | seconds | MB at the peak beyond the features |", "|---|---|---|---|")
    for step, rows in steps.items():
        for row in rows:
            yield f"| {step} | {row['rows']:,} | {row['ms'] / 1e3:.3g} | {row['peak_bytes'] / 1e6:.3g} |"
    yield ""
    for step, rows in steps.items():
        time, memory = (exponent([(row["rows"], row[what]) for row in rows]) for what in ("ms", "peak_bytes"))
        yield f"{step}: time grows as N^{time:.2f}, memory as N^{memory:.2f}."
    yield ""


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of log y over log x by least squares; NaN of fewer than two points."""
    if len(points) < 2:
        return math.nan
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - middle_x) ** 2 for a in x)


def plain(figures: dict[str, Any]) -> Iterator[str]:
    """A row for each benchmark, those of one group together."""
    yield from ("| group | benchmark | median, ms | more |", "|---|---|---|---|")
    for name, row in sorted(figures.items(), key=lambda item: (item[1]["group"] or "", item[0])):
        more = {key: value for key, value in row.items() if key not in ("group", "ms")}
        yield f"| {row['group'] or ''} | {name} | {row['ms']:.4g} | {words(more)} |"
    yield ""


def tables(folder: Path) -> str:
    """What the folder holds, as Markdown."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text())
        for case in stored["cases"].values():
            lines += [f"### {path.stem}", ""]
            lines += [
                f"{words(stored['machine'])}. Commit {case['commit']}, {case['date'][:10]}, {case['status']}.",
                "",
            ]
            if case["figures"]:
                lines += {"epoch": epoch, "growth": growth}.get(path.stem, plain)(case["figures"])
            if case.get("skipped"):
                lines += [f"Skipped: {'; '.join(case['skipped'])}.", ""]
    return "\n".join(lines).rstrip() or NOTHING


def page(text: str, results: Path) -> str:
    """The page with the CPU's tables renewed between their two marks."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{tables(results)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    PAGE.write_text(page(PAGE.read_text(), RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())

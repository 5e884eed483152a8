# SPDX-License-Identifier: Apache-2.0
"""Tables from the JSON files that ``make gpu`` leaves, so that no figure is ever typed.

python benchmarks/gpu/report.py                              # writes them into docs/benchmarks.md
python benchmarks/gpu/report.py --print benchmarks/results/h200
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by benchmarks/gpu/report.py: begin -->", "<!-- end -->"
NOTHING = "Not measured yet: `benchmarks/results/` has no GPU's folder."
STAGES = ("build", "test", "sanitizer", "ceilings", "kernels", "train")


def tables(folder: Path) -> str:
    """What one GPU's folder holds, as Markdown."""
    files = [folder / f"{stage}.json" for stage in STAGES]
    stages = {path.stem: json.loads(path.read_text()) for path in files if path.is_file()}
    if not stages:
        return NOTHING
    about = next(reversed(stages.values()))["machine"]
    lines = [f"**{about['gpu']}**: " + ", ".join(f"{k} {v}" for k, v in about.items() if k != "gpu" and v)]
    commits = sorted({case["commit"] for stage in stages.values() for case in stage["cases"].values()})
    dates = sorted(case["date"][:10] for stage in stages.values() for case in stage["cases"].values())
    lines += [f"Commit {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.", ""]
    lines += ["| stage | case | ended | seconds | figures |", "|---|---|---|---|---|"]
    for stage, stored in stages.items():
        for name, case in stored["cases"].items():
            figures = "see below" if stage == "kernels" and case["figures"] else words(case["figures"])
            lines.append(f"| {stage} | {name} | {case['status']} | {case['seconds']:g} | {figures} |")
    lines += kernel_table(stages.get("kernels", {"cases": {}}))
    return "\n".join(lines)


def kernel_table(stored: dict[str, Any]) -> Iterator[str]:
    """A row for each benchmark, those of one group together."""
    rows = [(row["group"] or case, name, row) for case, found in stored["cases"].items()
            for name, row in found["figures"].items()]  # fmt: skip
    if rows:
        yield from ("", "| group | benchmark | median, ms | more |", "|---|---|---|---|")
    for group, name, row in sorted(rows, key=lambda row: row[:2]):
        more = {key: value for key, value in row.items() if key not in ("group", "ms")}
        yield f"| {group} | {name} | {row['ms']:.4g} | {words(more)} |"


def words(figures: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in figures.items() if value is not None)  # fmt: skip


def page(text: str, results: Path) -> str:
    """The page with all tables renewed between its two marks."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    folders = sorted({path.parent for stage in STAGES for path in results.glob(f"*/{stage}.json")})
    made = "\n\n".join(f"### {folder.name}\n\n{tables(folder)}" for folder in folders) or NOTHING
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", type=Path, metavar="FOLDER", help="show one GPU's tables and write nothing")
    given = parser.parse_args(arguments)
    if given.print:
        print(tables(given.print))
    else:
        PAGE.write_text(page(PAGE.read_text(), RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())

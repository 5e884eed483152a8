# SPDX-License-Identifier: Apache-2.0
"""Does each method do what its paper says it does? Put to the test on rendered people, where the problem has a dial.

    python benchmarks/worlds/claims.py                # every arm, three seeds; what is done is not done again
    python benchmarks/worlds/claims.py --claim grey --seeds 1
    python benchmarks/worlds/claims.py --write        # runs nothing: renews docs/claims.md and its picture

A claim is a question, the dials that make its problem hard, and arms that differ in the one thing that it is about.
A seed is one world of people and cameras and one training; all arms meet the same ones, so differences are taken within
a seed. Each run leaves one JSON file; a broken run goes on after its last finished epoch. A run takes one core: start
the script once per claim to use more. Networks are small and start from random weights, so what does not hold here may
hold on real images, and the reverse.
"""

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats

import fastreid_u

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "claims"
PAGE, PICTURE = ROOT / "docs" / "claims.md", ROOT / "docs" / "images" / "claims.png"
END = "<!-- end -->"


@dataclass(frozen=True)
class Arm:
    """A method and what is changed of its settings for the rendered set; ``beside``, the arm it is compared with."""

    method: str
    settings: Mapping[str, Any]
    beside: str | None = None


@dataclass(frozen=True)
class Claim:
    """``arms`` in the order of the table; one stands after the one that it is compared with."""

    question: str
    dials: Mapping[str, Any]
    arms: Mapping[str, Arm]


PLAIN = Arm("cluster_contrast", {})
NOT_CENTRED = {"center_per_camera": False}
LONGER = {"epochs": 30, "step_size": 25}  # as the rows of the methods that it stands beside
SOURCE = {**LONGER, "source": "synthetic"}
SOURCE_WORLD = 50  # added to the seed: other people, other cameras

CLAIMS = {
    "gem": Claim(
        "GeM pooling beats average pooling (Cluster Contrast, appendix).",
        {},
        {"average": Arm("cluster_contrast", {"pooling_type": "avg"}), "GeM": Arm("cluster_contrast", {}, "average")},
    ),
    "grey": Claim(
        "A greyscale branch helps where colour cannot tell people apart (CACL).",
        {"palette": 3},
        {
            "cluster_contrast": Arm("cluster_contrast", LONGER),
            "CACL, both branches in colour": Arm("cacl", {"grey": False}),
            "CACL": Arm("cacl", {}, "CACL, both branches in colour"),
        },
    ),
    "cameras": Claim(
        "Proxies per camera withstand strong differences between cameras (CAP, ICE, CAP + Cluster Contrast).",
        {"shift": 0.8},
        {
            "cluster_contrast": PLAIN,
            "cluster_contrast, not centred": Arm("cluster_contrast", NOT_CENTRED),
            "CAP": Arm("cap", {}, "cluster_contrast"),
            "CAP, not centred": Arm("cap", NOT_CENTRED, "cluster_contrast, not centred"),
            "ICE without cameras": Arm("ice", {"camera_weight": 0.0}),
            "ICE": Arm("ice", {}, "ICE without cameras"),
            "CAP + Cluster Contrast": Arm("cap_cluster_contrast", {}, "cluster_contrast"),
        },
    ),
    "eps": Claim(
        "A radius that shrinks over the epochs beats a fixed one (DCCC).",
        {"occlusion": 0.4},
        {
            "eps fixed": Arm("dccc", {"eps_scheduler": "fix"}),
            "eps fixed at its last value": Arm("dccc", {"eps_scheduler": "fix", "eps": 0.46}, "eps fixed"),
            "eps falling": Arm("dccc", {}, "eps fixed at its last value"),
        },
    ),
    "intruders": Claim(
        "Attention over a cluster and the most dispersed positive withstand intruders (CSA + HPS).",
        {"intruders": 0.2},
        {
            "cluster_contrast": PLAIN,
            "mean, hardest": Arm("cluster_contrast", {"use_hard": True}, "cluster_contrast"),
            "CSA, rows moved as by Cluster Contrast": Arm("csa_hps", {"update_rule": "sequential"}, "cluster_contrast"),
            "CSA + HPS, attention not trained": Arm("csa_hps", {"saa_steps": 0}, "mean, hardest"),
            "CSA + HPS": Arm("csa_hps", {}, "mean, hardest"),
        },
    ),
    "source": Claim(
        "A labelled set of other people and other cameras helps (SpCL, SpCL + Cluster Contrast).",
        {"shift": 0.5},
        {
            "cluster_contrast": Arm("cluster_contrast", LONGER),
            "SpCL": Arm("spcl", LONGER),
            "SpCL with source": Arm("spcl_uda", SOURCE, "SpCL"),
            "Cluster Contrast with source": Arm("cluster_contrast_uda", SOURCE, "cluster_contrast"),
        },
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", choices=CLAIMS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of world and training")
    parser.add_argument("--epochs", type=int, help="default: those of each method's row for the rendered set")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, default=Path("runs/claims"), help="run folders")
    parser.add_argument("--write", action="store_true", help="run nothing, renew docs/claims.md")
    options = parser.parse_args()
    names = options.claim or list(CLAIMS)
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), options.out), encoding="utf-8")
        draw(options.out, PICTURE)
        return 0
    torch.set_num_threads(1)  # the number of threads changes sums in the last digit, and so every figure
    for seed in options.seeds:
        for name in names:
            for arm in CLAIMS[name].arms:
                run(name, arm, seed, options)
    for name in names:
        print(f"\n{CLAIMS[name].question}\n\n{table(options.out, name)}")
    return 0


def run(name: str, arm: str, seed: int, options: argparse.Namespace) -> None:
    """One training, unless its result lies there; a run that was broken off goes on."""
    claim, chosen = CLAIMS[name], CLAIMS[name].arms[arm]
    place = f"{name}/{_slug(arm)}-seed{seed}"
    result, logs = options.out / f"{place}.json", options.logs / place
    if result.exists():
        return
    print(f"{name}: {arm}, seed {seed}", flush=True)
    settings = {**chosen.settings, "seed": seed} | ({"epochs": options.epochs} if options.epochs else {})
    dials = {**claim.dials, "seed": seed}
    more = {"source_data": {**claim.dials, "seed": SOURCE_WORLD + seed}} if "source" in settings else {}
    broken = (logs / "state.safetensors").exists()
    trained = fastreid_u.train(
        "synthetic", method=chosen.method, logs_dir=logs, data=dials, quiet=True, resume=broken,
        overwrite=not broken, workers=0, eval_initial=False, eval_step=1000, **more, **settings,
    )  # fmt: skip
    last = trained.last
    record = {
        "claim": name,
        "arm": arm,
        "seed": seed,
        "method": chosen.method,
        "settings": settings,
        "centred": trained.config.center_per_camera,
        "dials": dials,
        **more,
        **{key: last[key] for key in ("mAP", "top1", "ari", "clusters", "unclustered")},
        "epochs": trained.config.epochs,
        "seconds": round(sum(sum(r.get("seconds", {}).values()) for r in trained.records)),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def table(folder: Path, name: str) -> str:
    """Markdown: mean and standard deviation over seeds, and so for the differences, which are taken seed by seed.

    A difference is bold where a paired t test, two-sided, makes chance less likely than one in twenty.
    """
    lines = ["| arm | centred | runs | mAP % | top-1 % | ARI | mAP, difference |", "|---|---|---|---|---|---|---|"]
    records = _records(folder, name)
    mean_ap = {arm: {r["seed"]: 100 * r["mAP"] for r in own} for arm, own in records.items()}
    for arm, own in records.items():
        if not own:
            lines.append(f"| {arm} | | 0 | not run | | | |")
            continue
        other = CLAIMS[name].arms[arm].beside
        pairs = [value - mean_ap[other][seed] for seed, value in mean_ap[arm].items() if seed in mean_ap.get(other, {})]
        lines.append(
            f"| {arm} | {'on' if own[0]['centred'] else 'off'} | {len(own)} | {_spread(list(mean_ap[arm].values()))} | "
            f"{_spread([100 * r['top1'] for r in own])} | {statistics.mean(r['ari'] for r in own):.2f} | "
            + (f"{_difference(pairs)} to {other} |" if pairs else "|")
        )
    return "\n".join(lines)


def page(text: str, folder: Path) -> str:
    """The page with the table between the two marks of each claim renewed."""
    for name, claim in CLAIMS.items():
        begin = f"<!-- {name}: made by benchmarks/worlds/claims.py -->\n"
        head, rest = text.split(begin)
        dials = ", ".join(f"`{key}` {value}" for key, value in claim.dials.items()) or "at their defaults"
        made = f"{claim.question} Dials: {dials}.\n\n{table(folder, name)}\n"
        text = f"{head}{begin}{made}{END}{rest.split(END, 1)[1]}"
    return text


def draw(folder: Path, path: Path) -> None:
    """One panel a claim, one row an arm, one dot a seed; the bar is the mean."""
    from matplotlib.figure import Figure

    heights = [len(claim.arms) + 1 for claim in CLAIMS.values()]
    figure = Figure(figsize=(8, 0.27 * sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(CLAIMS), sharex=True, height_ratios=heights)
    for (name, claim), panel in zip(CLAIMS.items(), panels, strict=True):
        for row, own in enumerate(_records(folder, name).values()):
            values = [100 * r["mAP"] for r in own]
            if values:
                colour = "tab:blue" if own[0]["centred"] else "tab:gray"
                panel.barh(row, statistics.mean(values), color=colour, alpha=0.3)
                panel.plot(values, [row] * len(values), "o", color=colour, markersize=4)
        panel.set_yticks(range(len(claim.arms)), claim.arms)
        panel.invert_yaxis()
        panel.set_title(claim.question, loc="left", x=-0.46, fontsize="small")
        panel.tick_params(labelsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("mAP %; a dot is a seed; grey = not centred per camera", fontsize="small")
    panels[-1].set_xlim(0, 100)
    figure.savefig(path, dpi=110)


def _records(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm, by seed."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / name).glob("*.json")]
    records.sort(key=lambda r: r["seed"])
    return {arm: [r for r in records if r["arm"] == arm] for arm in CLAIMS[name].arms}


def _spread(values: list[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _difference(pairs: list[float]) -> str:
    text = _spread(pairs, "+")
    if len(pairs) < 2:
        return text
    bar = stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"**{text}**" if abs(statistics.mean(pairs)) > bar else text


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-").replace("--", "-")


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())

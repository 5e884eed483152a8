# SPDX-License-Identifier: Apache-2.0
"""``curves.png``: one glance at a run. Ranking quality, clusters, label quality and loss over the epochs."""

from pathlib import Path
from typing import Any

from fastreid_u.engine.checkpoint import write_whole

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9822b", "#3a8f5c", "#8a8f98"


def _series(records: list[dict[str, Any]], name: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    points = [(r["epoch"], r[name] * scale) for r in records if r.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def draw_curves(
    records: list[dict[str, Any]],
    path: Path,
    title: str,
    *,
    true_clusters: int | None = None,
    ranked_on: str = "test split",
) -> None:
    """Draw ``records`` (one dict per epoch, as in metrics.jsonl; epoch -1 = before training) to a PNG at ``path``.

    Args:
        title: of the whole picture.
        true_clusters: identities in the training images, drawn as a line.
        ranked_on: what mAP was measured on, as in "test split".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    # the name of a folder may hold bytes that no font can draw
    figure.suptitle(title.encode("utf-8", "backslashreplace").decode(), fontsize=12)
    (ranking, clusters), (quality, loss) = figure.subplots(2, 2)

    def plot(axes, name: str, label: str, color: str, scale: float = 1.0) -> None:
        x, y = _series(records, name, scale)
        if x:
            axes.plot(x, y, color=color, label=label, marker="o", markersize=3.5, linewidth=1.8)

    evaluated = any(r.get("mAP") is not None for r in records)
    ranking.set_title(f"ranking on the {ranked_on}, %" if evaluated else "ranking: not evaluated")
    plot(ranking, "top1", "top-1", ORANGE, 100)
    plot(ranking, "mAP", "mAP", BLUE, 100)
    ranking.set_ylim(0, 100)

    clusters.set_title("clusters, and share of images left un-clustered")
    plot(clusters, "clusters", "clusters", BLUE)
    if true_clusters:
        clusters.axhline(true_clusters, color=GREY, linewidth=1, linestyle="--", label="true identities")
    clusters.set_ylim(bottom=0)
    share = clusters.twinx()
    x, y = _series(records, "unclustered", 100)
    share.fill_between(x, y, color=ORANGE, alpha=0.25, linewidth=0, label="un-clustered, %")
    share.set_ylim(0, 100)
    share.tick_params(axis="y", colors=ORANGE)

    quality.set_title("labels: against the truth (ARI, NMI) and the epoch before")
    plot(quality, "nmi", "NMI", GREEN)
    plot(quality, "ari", "ARI", BLUE)
    plot(quality, "agreement", "agreement with last epoch", GREY)
    quality.set_ylim(0, 1.02)

    loss.set_title("training loss")
    plot(loss, "loss", "loss", BLUE)
    loss.set_ylim(bottom=0)

    for axes in (ranking, clusters, quality, loss):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        if axes is clusters:
            more = share.get_legend_handles_labels()
            handles, labels = handles + more[0], labels + more[1]
        if len(handles) > 1:
            axes.legend(handles, labels, frameon=False, fontsize=8, loc="best")
    share.spines["top"].set_visible(False)
    write_whole(path, lambda file: figure.savefig(file, format="png"))

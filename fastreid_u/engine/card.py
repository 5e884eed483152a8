# SPDX-License-Identifier: Apache-2.0
"""The texts of a run: recipe card, table row per epoch, final block. Numbers become lines; nothing is shown here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastreid_u.config import Config
from fastreid_u.engine.evaluate import Split
from fastreid_u.engine.records import Records
from fastreid_u.recipe import Recipe

# Fields for how and on what the recipe runs, not for what it is; ``compat`` has a line of its own.
_MACHINE = {
    "compat",
    "workers",
    "worker_start",
    "cache_images",
    "channels_last",
    "print_freq",
    "seed",
    "eval_step",
    "eval_initial",
    "eval_batch_size",
    "source",
}


@dataclass(frozen=True)
class RecipeCard:
    """What a run is, and in what it departs from the published one.

    Attributes:
        method, config: the method and its settings.
        dataset: name of the set to learn.
        model: the network's description, as ``ReIDModel.describe`` gives it.
        labels: the label generator's, of ``LabelGenerator.describe``.
        device: where it runs.
        selects: how ``model_best`` is chosen.
        scale: the people that the labels' settings fit, of ``LabelGenerator.scale``; empty where unknown.
        speed: layout, precision and batches of features, as ``speed_line`` has them.
    """

    method: type[Recipe]
    config: Config
    dataset: str
    model: Mapping[str, Any]
    labels: str
    device: str
    selects: str
    scale: str = ""
    speed: str = ""

    def lines(self) -> list[str]:
        """The card, a line of text each."""
        method, config, model = self.method, self.config, self.model
        return [
            f"{method.paper.title} on {self.dataset}, seed {config.seed}, {self.device}",
            f"  network     {model['arch']}, {model['parameters'] / 1e6:.1f} M parameters, "
            f"{model['num_features']} features, pooling {model['pooling']}, weights {model['weights']}",
            f"  labels      {self.labels}, per-camera centring "
            + ("ON (not in the published recipe)" if config.center_per_camera else "off"),
            *([f"  scale       {self.scale}"] if self.scale else []),
            f"  batch       {config.batch_size} = {config.batch_size // config.num_instances} clusters "
            f"x {config.num_instances} images, BatchNorm over {config.bn_group or config.batch_size}",
            *([f"  speed       {self.speed}"] if self.speed else []),
            f"  evaluation  AP formula {config.ap}; {self.selects}",
            *self._compat(),
            *self._departures(),
        ]

    def _compat(self) -> list[str]:
        if self.method.paper.compat:
            how = "on: as" if self.config.compat else "off: not always as"
            return [f"  compat      {how} published code, docs/quirks.md"]
        return ["  compat      on, which changes nothing in this method"] if self.config.compat else []

    def _departures(self) -> list[str]:
        """Settings that differ from the published ones, which for some methods change from set to set."""
        ours, rendered = self.config, self.dataset == "synthetic"  # the rendered set's settings are not published
        theirs = self.method.Config.for_dataset("" if rendered else self.dataset)
        names = [field.name for field in dataclasses.fields(ours) if field.name not in _MACHINE]
        names = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
        published = self.method.paper.published
        recipe, whose = ("the published recipe", "published") if published else ("the method's own defaults", "default")
        if not names:
            return [f"  same settings as {recipe}"]
        width = max(map(len, names))
        return [
            f"  differs from {recipe} in:",
            *(f"    {n:<{width}}  {getattr(ours, n)!s:<10} {whose} {getattr(theirs, n)}" for n in names),
        ]


def model_selection(recipe: Recipe, split: Split | None) -> str:
    """How ``model_best`` is chosen, for the card."""
    if split is None:
        return "nothing to evaluate on, so no model_best"
    text = f"model_best is chosen on the {split.place}"
    if split.queries is None or not recipe.paper.published:
        return text
    return f"{text}, as published" if recipe.paper.model == "best" else f"{text}; published: the last epoch"


_COLUMNS = (
    # name, heading, width, format
    ("epoch", "epoch", 5, "{}"),
    ("clusters", "clusters", 8, "{}"),
    ("unclustered", "unclust.", 8, "{:.1%}"),
    ("largest", "largest", 7, "{}"),
    ("agreement", "agree", 5, "{:.2f}"),
    ("ari", "ARI", 5, "{:.2f}"),
    ("nmi", "NMI", 5, "{:.2f}"),
    ("loss", "loss", 6, "{:.3f}"),
    ("mAP", "mAP", 6, "{:.1%}"),
    ("top1", "top-1", 6, "{:.1%}"),
)


def table_head() -> str:
    cells = [f"{heading:>{width}}" for _, heading, width, _ in _COLUMNS]
    return "  ".join(cells) + "  seconds: extract label fit evaluate"


def table_row(record: dict[str, Any]) -> str:
    """One line per epoch; what an epoch does not have is a dash."""
    cells = []
    for name, _, width, form in _COLUMNS:
        value = record.get(name)
        cells.append(f"{'-' if value is None else form.format(value):>{width}}")
    seconds = record.get("seconds", {})
    times = " ".join(
        f"{seconds[phase]:.1f}" if phase in seconds else "-" for phase in ("extract", "label", "fit", "evaluate")
    )
    return "  ".join(cells) + "  " + times


def metric_block(metrics: dict[str, Any]) -> list[str]:
    """The usual mAP/CMC lines of the field's code."""
    lines = [f"Mean AP: {metrics['mAP']:4.1%}", "CMC Scores:"]
    lines += [f"  top-{rank:<4}{metrics[f'top{rank}']:12.1%}" for rank in (1, 5, 10)]
    lines.append(f"mINP: {metrics['mINP']:4.1%}")
    return lines


def outcome(records: Records, place: str) -> list[str]:
    """What training did to mAP, and a warning where it did harm. ``place`` is what was ranked, as in "test split"."""
    start, best, last = records.start, records.best, records.last
    if last["epoch"] < 0:
        return [f"mAP {last['mAP']:.1%} before training, on the {place}; no epoch was trained"]
    text = f"last epoch {last['epoch']}, mAP {last['mAP']:.1%}; "
    text += f"best mAP {best['mAP']:.1%} at epoch {best['epoch']}, on the {place}"
    if start is None:
        return [f"start not evaluated (eval_initial=True, --eval-initial); {text}"]
    text = f"start mAP {start['mAP']:.1%}; {text}"
    if best["mAP"] < start["mAP"]:
        harm = (
            f"warning: training only did harm: no epoch reached the mAP of the network before it ({start['mAP']:.1%}). "
            'model_best is worse than that network too; docs/runs.md, "When training does harm", has what to try'
        )
        return [text, harm]
    if last["mAP"] < start["mAP"]:
        return [text, "warning: the last epoch ranks worse than the network before training; use model_best"]
    return [text]

# SPDX-License-Identifier: Apache-2.0
"""The texts of a run: recipe card, table row per epoch, final block. Pure functions from numbers to lines."""

import dataclasses
from typing import Any

from fastreid_u.config import Config
from fastreid_u.recipe import Recipe

# Fields that say how a machine runs the recipe, or on what, not what the recipe is; ``compat`` has a line of its own.
_MACHINE = {
    "compat",
    "workers",
    "cache_images",
    "channels_last",
    "print_freq",
    "seed",
    "eval_step",
    "eval_initial",
    "eval_batch_size",
    "source",
}


def recipe_card(
    method: type[Recipe],
    config: Config,
    dataset: str,
    *,
    model: dict[str, Any],
    labels: str,
    device: str,
    selects: str,
) -> list[str]:
    """What this run is, and in what it departs from the published one.

    ``model`` and ``labels`` are what the network and the label generator say of themselves.
    """
    # Some settings are published per data set. The rendered set's are ours.
    published = method.Config.for_dataset(dataset if dataset != "synthetic" else "")
    fields = dataclasses.fields(config)
    differing = [f for f in fields if f.name not in _MACHINE and getattr(config, f.name) != getattr(published, f.name)]

    lines = [f"{method.paper.title} on {dataset}, seed {config.seed}, {device}"]
    lines.append(
        f"  network     {model['arch']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{model['num_features']} features, pooling {model['pooling']}, weights {model['weights']}"
    )
    lines.append(
        f"  labels      {labels}, "
        f"per-camera centring {'ON (ours, not in the published recipe)' if config.center_per_camera else 'off'}"
    )
    lines.append(
        f"  batch       {config.batch_size} = {config.batch_size // config.num_instances} clusters "
        f"x {config.num_instances} images, BatchNorm over {config.bn_group or config.batch_size}"
    )
    lines.append(f"  evaluation  AP formula {config.ap}; {selects}")
    if method.paper.compat:
        how = "on: as" if config.compat else "off: not always as"
        lines.append(f"  compat      {how} published code, docs/quirks.md")
    elif config.compat:
        lines.append("  compat      on, which changes nothing in this method")
    recipe, whose = (
        ("the published recipe", "published") if method.paper.published else ("the method's own defaults", "default")
    )
    if differing:
        lines.append(f"  differs from {recipe} in:")
        width = max(len(f.name) for f in differing)
        for field in differing:
            ours, theirs = getattr(config, field.name), getattr(published, field.name)
            lines.append(f"    {field.name:<{width}}  {ours!s:<10} {whose} {theirs}")
    else:
        lines.append(f"  same settings as {recipe}")
    return lines


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

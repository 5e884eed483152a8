# SPDX-License-Identifier: Apache-2.0
"""What a run can be told: a frozen dataclass, each field with its default, its meaning and the default's source.

A method subclasses ``Config`` in its own file and changes or adds fields. ``PER_DATASET`` holds the values that
its authors change from set to set (and, for the rendered set, ours). Nothing here imports anything heavy.
"""

import dataclasses
import difflib
import math
import numbers
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_type_hints

OURS = "ours"
LINEAGE = "SpCL lineage"  # the same in SpCL, Cluster Contrast and the code that descends from them


def option(default: Any, help: str, *, source: str = OURS, flags: tuple[str, ...] = (), choices: tuple = ()) -> Any:
    """A dataclass field that knows its meaning, the source of its default, its short flags and its valid values."""
    metadata = {"help": help, "source": source, "flags": flags, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


# Ours, chosen on rendered validation worlds (docs/synthetic.md): small network, random weights, a CPU. Every method's
# row for the rendered set starts from these.
RENDERED: Mapping[str, Any] = {
    "height": 128, "width": 64, "arch": "resnet10", "weights": None, "bn_group": None, "calibrate_bn": 8,
    "center_per_camera": True, "color_jitter": 0.2, "erase": 0.3, "eps": 0.5, "k1": 20,
    "batch_size": 64, "num_instances": 4, "lr": 2e-3, "epochs": 18, "iters": 30, "step_size": 15, "amp": "auto",
    "channels_last": True, "workers": 2, "cache_images": True, "eval_step": 1, "eval_initial": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields every method shares. Lengths are in pixels, rates per optimiser step, probabilities in [0, 1]."""

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    # data and augmentation
    height: int = option(256, "image height in pixels", source=LINEAGE)
    width: int = option(128, "image width in pixels", source=LINEAGE)
    erase: float = option(0.5, "probability of random erasing", source=LINEAGE)
    color_jitter: float = option(0.0, "strength of brightness, contrast and saturation jitter; 0 = off", source=LINEAGE)
    pixel_norm: str = option(
        "imagenet",
        "mean and deviation that pixels are normalised by; half = 0.5 and 0.5",
        source=LINEAGE,
        choices=("imagenet", "half"),
    )
    workers: int = option(4, "processes that read images; 0 reads in the main process", source=LINEAGE, flags=("-j",))
    cache_images: bool = option(False, "keep decoded, resized images in memory (3*height*width bytes each)")

    # pseudo-labels
    eps: float = option(0.6, "DBSCAN radius in Jaccard distance", source=LINEAGE)
    min_samples: int = option(4, "neighbours, itself included, that make a core point", source=LINEAGE)
    k1: int = option(30, "neighbours per k-reciprocal list, itself included", source=LINEAGE)
    k2: int = option(6, "rows averaged in query expansion, itself included; 1 = off", source=LINEAGE)
    center_per_camera: bool = option(
        False,
        "subtract each camera's mean feature before clustering (labels only; evaluation uses plain features)",
    )

    # batches
    batch_size: int = option(256, "images per step", source=LINEAGE, flags=("-b",))
    num_instances: int = option(16, "images per cluster in a batch", source=LINEAGE)
    no_cam: bool = option(False, "draw a cluster's images without regard to cameras", source=LINEAGE)

    # model
    arch: str = option("resnet50", "network; see `fastreid_u.models.model_names()`", source=LINEAGE, flags=("-a",))
    pooling_type: str = option("avg", "spatial pooling", source=LINEAGE, choices=("avg", "gem", "max"))
    stem_relu: bool = option(True, "ReLU after a ResNet's stem; published CAP runs without", source=LINEAGE)
    drop_path: float = option(0.0, "stochastic depth of timm's networks in training", source=LINEAGE)
    weights: str | None = option("imagenet", '"imagenet", a file, or None for random weights', source=LINEAGE)
    bn_group: int | None = option(None, "images per BatchNorm group in training; None = whole batch")
    bn_running: str = option(
        "first",
        "which groups feed BatchNorm's running statistics",
        source="what DataParallel does",
        choices=("first", "mean"),
    )
    calibrate_bn: int = option(0, "batches to estimate BatchNorm statistics from before the first labels")

    # optimisation
    optimizer: str = option("adam", "optimiser; sgd has momentum 0.9", source=LINEAGE, choices=("adam", "adamw", "sgd"))
    reset_optimizer: bool = option(False, "forget the optimiser's moments at the start of every epoch", source=LINEAGE)
    lr: float = option(3.5e-4, "learning rate", source=LINEAGE)
    weight_decay: float = option(5e-4, "L2 penalty, on all parameters", source=LINEAGE)
    epochs: int = option(50, "epochs; labels are made anew in each", source=LINEAGE)
    iters: int = option(400, "steps per epoch; 0 = one pass of the sampler", source=LINEAGE)
    step_size: int = option(20, "epochs between learning-rate drops; 0 = never", source=LINEAGE)
    gamma: float = option(0.1, "factor of a learning-rate drop", source=LINEAGE)
    warmup_epochs: int = option(0, "epochs over which the learning rate rises linearly to lr; 0 = none", source=LINEAGE)
    warmup_factor: float = option(0.1, "share of lr in the first warm-up epoch", source="DCCC, ICE")
    amp: str = option(
        "off",
        "bfloat16 autocast of the network; auto = where the CPU has it natively",
        source="published runs are float32",
        choices=("off", "bf16", "auto"),
    )
    channels_last: bool = option(False, "memory layout of images and convolutions; changes speed, not results")

    # evaluation
    eval_step: int = option(10, "epochs between evaluations; the last epoch is always evaluated", source=LINEAGE)
    eval_initial: bool = option(False, "also evaluate the network before training")
    eval_batch_size: int = option(256, "images per batch in extraction; changes speed, not results")
    ap: str = option(
        "rank",
        "formula of average precision; most published code uses sklearn's, equal without ties",
        choices=("rank", "sklearn", "trapezoid"),
    )

    # run
    compat: bool = option(False, "follow the published code where it departs from its paper (docs/quirks.md)")
    seed: int = option(1, "seed of everything random in the run", source=LINEAGE)
    print_freq: int = option(10, "steps between progress lines when not on a terminal", source=LINEAGE)

    def __post_init__(self) -> None:
        validate(self)

    @classmethod
    def for_dataset(cls, dataset: str, **overrides: Any) -> Self:
        """The method's defaults for ``dataset``, then ``overrides``; an unknown name lists close ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in overrides:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(sorted(known))}"
                raise TypeError(f"train: unknown option {name!r}{hint}")
        return cls(**{**cls.PER_DATASET.get(dataset, {}), **overrides})

    def pixel_statistics(self) -> dict[str, tuple[float, float, float]]:
        """``mean`` and ``std`` for the transforms; without entries, theirs are ImageNet's."""
        return pixel_statistics(self.pixel_norm)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def pixel_statistics(pixel_norm: str) -> dict[str, tuple[float, float, float]]:
    """What ``Config.pixel_norm`` means for ``train_transform`` and ``test_transform``."""
    return {} if pixel_norm == "imagenet" else {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


# The rule of each number, in one place: (fields, test, words).
_RULES = (
    (("height", "width", "min_samples", "k1", "k2"), lambda v: v >= 1, "be at least 1"),
    (("batch_size", "num_instances", "epochs", "eval_step"), lambda v: v >= 1, "be at least 1"),
    (("eval_batch_size", "print_freq"), lambda v: v >= 1, "be at least 1"),
    (("workers", "iters", "step_size", "warmup_epochs", "calibrate_bn"), lambda v: v >= 0, "be 0 or more"),
    (("seed",), lambda v: 0 <= v < 2**32, "lie in [0, 2**32)"),
    (("erase", "warmup_factor"), lambda v: 0 <= v <= 1, "lie in [0, 1]"),
    (("color_jitter", "weight_decay"), lambda v: 0 <= v < math.inf, "be 0 or more"),
    (("lr", "gamma"), lambda v: 0 < v < math.inf, "be positive"),
    (("eps",), lambda v: 0 < v < 1, "lie in (0, 1)"),
    (("drop_path",), lambda v: 0 <= v < 1, "lie in [0, 1)"),
)


def validate(config: Config) -> None:
    """Types, choices and ranges; raises ValueError or TypeError naming field, rule and value."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, os.PathLike) or not isinstance(value, hints[field.name]):
            value = plain(value)
            object.__setattr__(config, field.name, value)
        if isinstance(value, int) and not isinstance(value, bool) and hints[field.name] is float:
            object.__setattr__(config, field.name, float(value))
        elif not isinstance(value, hints[field.name]) or (isinstance(value, bool) and hints[field.name] is not bool):
            kind = getattr(hints[field.name], "__name__", str(hints[field.name]))
            raise TypeError(f"config: {field.name} must be {kind}, got {value!r}")
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"config: {field.name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    for names, holds, words in _RULES:
        for name in names:
            value = getattr(config, name)
            if not holds(value):
                raise ValueError(f"config: {name} must {words}, got {value!r}")
    if config.bn_group is not None and config.bn_group < 2:
        raise ValueError(f"config: bn_group must be at least 2 or None, got {config.bn_group!r}")
    if config.batch_size % config.num_instances:
        raise ValueError(
            f"config: batch_size must be a multiple of num_instances ({config.num_instances}), got {config.batch_size}"
        )


def plain(value: Any) -> Any:
    """NumPy's numbers and truth values as Python's, paths as text: what a file of settings can hold."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | str) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def dump_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML text of flat tables of str, int, float, bool and None; None becomes a comment, as TOML has no null."""
    lines: list[str] = []
    for table, values in tables.items():
        lines.append(f"[{table}]")
        for key, value in values.items():
            lines.append(f"# {key} = none" if value is None else f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    raise TypeError(f"config: a value must be str, int, float, bool or None to be saved, got {value!r}")


def load_toml(text: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads(text)

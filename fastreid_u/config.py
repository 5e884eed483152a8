# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: a frozen dataclass, each field with its default, its meaning and the default's source.

A method subclasses ``Config`` in its own file and changes or adds fields. ``PER_DATASET`` holds the values that
its authors change from set to set (and, for the rendered set, ours). Nothing here imports anything heavy.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_args, get_type_hints

from fastreid_u._toml import plain
from fastreid_u.pixel_norm import RULE, is_pixel_norm

OURS = "ours"
LINEAGE = "SpCL lineage"  # the same in SpCL, Cluster Contrast and the code that descends from them


@dataclass(frozen=True)
class Rule:
    """What a field's value must obey; None, where the type allows it, obeys every rule.

    Attributes:
        words: the rule as it stands in the error, after "must": "be positive".
        holds: whether a value obeys it.
    """

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("be positive", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = Rule("be 0 or more", lambda v: 0 <= v < math.inf)
IN_UNIT = Rule("lie in [0, 1]", lambda v: 0 <= v <= 1)
WITHIN_UNIT = Rule("lie in (0, 1)", lambda v: 0 < v < 1)
BELOW_ONE = Rule("lie in [0, 1)", lambda v: 0 <= v < 1)
SEED = Rule("lie in [0, 2**32)", lambda v: 0 <= v < 2**32)


def at_least(least: int) -> Rule:
    return Rule(f"be at least {least}", lambda v: v >= least)


def option(
    default: Any,
    help: str,
    *,
    source: str = OURS,
    flags: tuple[str, ...] = (),
    choices: tuple = (),
    rule: Rule | None = None,
    switch: bool = False,
) -> Any:
    """A dataclass field that knows its meaning, its default's source, its short flags, and which values are valid.

    A ``switch`` is on or off in the shell, as every bool is, though None is its default.
    """
    metadata = {"help": help, "source": source, "flags": flags, "choices": choices, "rule": rule, "switch": switch}
    return dataclasses.field(default=default, metadata=metadata)


def changed(default: Any, help: str | None = None, *, source: str = OURS, rule: Rule | None = None) -> Any:
    """Another default for a field of the base class: ``epochs = changed(75, source=LOG)``, without a type.

    Type, flags and choices stay those of the base class; so do ``help`` and ``rule`` unless others are given.
    """
    given = {"help": help, "source": source, "rule": rule}
    return _Changed(default, {key: value for key, value in given.items() if value is not None})


@dataclass(frozen=True)
class _Changed:
    """What ``changed`` leaves in a class body until ``Config`` makes a field of it."""

    default: Any
    metadata: Mapping[str, Any]


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
    height: int = option(256, "image height in pixels", source=LINEAGE, rule=at_least(1))
    width: int = option(128, "image width in pixels", source=LINEAGE, rule=at_least(1))
    erase: float = option(0.5, "probability of random erasing", source=LINEAGE, rule=IN_UNIT)
    color_jitter: float = option(
        0.0, "strength of brightness, contrast and saturation jitter; 0 = off", source=LINEAGE, rule=NOT_NEGATIVE
    )
    pixel_norm: str = option(
        "imagenet",
        "mean and deviation of pixels: imagenet, half (0.5 and 0.5), clip or six numbers with commas; left out, those "
        "of the weights that are downloaded",
        source=LINEAGE,
        rule=Rule(RULE, is_pixel_norm),
    )
    workers: int = option(
        4, "processes that read images; 0 reads in the main process", source=LINEAGE, flags=("-j",), rule=NOT_NEGATIVE
    )
    worker_start: str | None = option(
        None,
        "how workers start, with equal results; None = fork on Linux, else Python's default",
        choices=("fork", "forkserver", "spawn"),
    )
    truncated_images: bool = option(False, "use images whose file ends early, as far as they go; off = leave them out")
    cache_images: bool = option(False, "keep decoded, resized images in memory (3*height*width bytes each)")

    # pseudo-labels
    eps: float = option(0.6, "DBSCAN radius in Jaccard distance", source=LINEAGE, rule=WITHIN_UNIT)
    min_samples: int = option(
        4, "neighbours, itself included, that make a core point", source=LINEAGE, rule=at_least(1)
    )
    k1: int = option(30, "neighbours per k-reciprocal list, itself included", source=LINEAGE, rule=at_least(1))
    k2: int = option(
        6, "rows averaged in query expansion, itself included, k1 at most; 1 = off", source=LINEAGE, rule=at_least(1)
    )
    center_per_camera: bool = option(
        False,
        "subtract each camera's mean feature before clustering (labels only; evaluation uses plain features)",
    )

    # batches
    batch_size: int = option(256, "images per step", source=LINEAGE, flags=("-b",), rule=at_least(2))
    num_instances: int = option(16, "images per cluster in a batch", source=LINEAGE, rule=at_least(1))
    no_cam: bool = option(False, "draw a cluster's images without regard to cameras", source=LINEAGE)

    # model
    arch: str = option("resnet50", "network; see `fastreid_u.models.model_names()`", source=LINEAGE, flags=("-a",))
    pooling_type: str = option("avg", "spatial pooling", source=LINEAGE, choices=("avg", "gem", "max"))
    stem_relu: bool = option(True, "ReLU after a ResNet's stem; published CAP runs without", source=LINEAGE)
    drop_path: float = option(0.0, "stochastic depth of timm's networks in training", source=LINEAGE, rule=BELOW_ONE)
    weights: str | None = option("imagenet", '"imagenet", a file, or None for random weights', source=LINEAGE)
    bn_group: int | None = option(
        None,
        "images per BatchNorm group in training; None = whole batch",
        rule=Rule("be at least 2 or None", lambda v: v >= 2),
    )
    bn_running: str = option(
        "first",
        "which groups feed BatchNorm's running statistics",
        source="what DataParallel does",
        choices=("first", "mean"),
    )
    calibrate_bn: int = option(
        0, "batches to estimate BatchNorm statistics from before the first labels", rule=NOT_NEGATIVE
    )

    # optimisation
    optimizer: str = option("adam", "optimiser; sgd has momentum 0.9", source=LINEAGE, choices=("adam", "adamw", "sgd"))
    reset_optimizer: bool = option(False, "forget the optimiser's moments at the start of every epoch", source=LINEAGE)
    lr: float = option(3.5e-4, "learning rate", source=LINEAGE, rule=POSITIVE)
    weight_decay: float = option(5e-4, "L2 penalty, on all parameters", source=LINEAGE, rule=NOT_NEGATIVE)
    epochs: int = option(
        50,
        "epochs; labels are made anew in each; 0 = only evaluate and save the network before training",
        source=LINEAGE,
        rule=at_least(0),
    )
    iters: int = option(400, "steps per epoch; 0 = one pass of the sampler", source=LINEAGE, rule=NOT_NEGATIVE)
    step_size: int = option(20, "epochs between learning-rate drops; 0 = never", source=LINEAGE, rule=NOT_NEGATIVE)
    gamma: float = option(0.1, "factor of a learning-rate drop", source=LINEAGE, rule=POSITIVE)
    warmup_epochs: int = option(
        0, "epochs over which the learning rate rises linearly to lr; 0 = none", source=LINEAGE, rule=NOT_NEGATIVE
    )
    warmup_factor: float = option(0.1, "share of lr in the first warm-up epoch", source="DCCC, ICE", rule=IN_UNIT)
    amp: str = option(
        "off",
        "bfloat16 autocast of the network; auto = where the CPU has it natively, for features always, in steps of "
        "networks without depthwise convolutions",
        source="published runs are float32",
        choices=("off", "bf16", "auto"),
    )
    channels_last: bool | None = option(
        None,
        "memory layout of images and convolutions; changes speed, and results by rounding only; None = on where it is "
        "faster, a CPU with oneDNN",
        switch=True,
    )

    # evaluation
    eval_step: int = option(
        10, "epochs between evaluations; the last epoch is always evaluated", source=LINEAGE, rule=at_least(1)
    )
    eval_initial: bool = option(False, "also evaluate the network before training")
    eval_batch_size: int | None = option(
        None,
        "images per batch in extraction; changes speed, and results by rounding only; None = 256 on a GPU, on a CPU as "
        "many as 32 of 128 x 64 pixels",
        rule=at_least(1),
    )
    ignore_cameras: bool = option(
        False, "rank also the images of the query's own camera, for people who are each seen by one camera only"
    )
    ap: str = option(
        "rank",
        "formula of average precision; most published code uses sklearn's, equal without ties",
        choices=("rank", "sklearn", "trapezoid"),
    )

    # run
    compat: bool = option(False, "follow the published code where it departs from its paper (docs/quirks.md)")
    seed: int = option(1, "seed of everything random in the run", source=LINEAGE, rule=SEED)
    print_freq: int = option(
        10, "steps between progress lines when not on a terminal", source=LINEAGE, rule=at_least(1)
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes a field of each ``changed``, from the base class's; this runs before ``dataclass`` reads the class."""
        super().__init_subclass__(**kwargs)
        for name, change in list(vars(cls).items()):
            if isinstance(change, _Changed):
                _make_field(cls, name, change)

    def __post_init__(self) -> None:
        """Rules between fields; a subclass calls this first, then states its own."""
        validate(self)
        if self.batch_size % self.num_instances:
            raise ValueError(
                f"config: batch_size must be a multiple of num_instances ({self.num_instances}), got {self.batch_size}"
            )

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

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def _make_field(cls: type[Config], name: str, change: _Changed) -> None:
    """Give ``cls`` the type and the field of ``name`` that a dataclass would have if both stood there in full."""
    for base in cls.__mro__[1:]:
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None:
            cls.__annotations__[name] = get_type_hints(base)[name]
            metadata = {**field.metadata, **change.metadata}
            setattr(cls, name, dataclasses.field(default=change.default, metadata=metadata))
            return
    raise TypeError(f"config: changed must name a field of a base class of {cls.__name__}, got {name!r}")


def validate(config: Config) -> None:
    """Each field's type, choices and rule; raises TypeError or ValueError naming field, rule and value."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _typed(field.name, getattr(config, field.name), hints[field.name])
        object.__setattr__(config, field.name, value)
        choices, rule = field.metadata.get("choices"), field.metadata.get("rule")
        if choices and value is not None and value not in choices:
            raise ValueError(f"config: {field.name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if rule and value is not None and not rule.holds(value):
            raise ValueError(f"config: {field.name} must {rule.words}, got {value!r}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` has it: NumPy's numbers as Python's, whole numbers as floats."""
    if not (isinstance(value, os.PathLike) and isinstance(value, hint)):
        value = plain(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and bool not in (hint, *get_args(hint))):
        raise TypeError(f"config: {name} must be {hint.__name__ if isinstance(hint, type) else hint}, got {value!r}")
    return value

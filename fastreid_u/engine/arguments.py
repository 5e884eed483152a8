# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``train``: checked, completed from the run that is resumed, and made into one experiment."""

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u._toml import plain
from fastreid_u.config import Config
from fastreid_u.engine.network_settings import fitted_to_network
from fastreid_u.recipe import Recipe
from fastreid_u.recipes import get_method, methods

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset

# A resumed run may be given these anew; anything else would make it another experiment.
RESUMABLE = {"epochs", "workers", "worker_start", "cache_images", "print_freq", "eval_step", "eval_batch_size"}

# A rendered source has other people and cameras than the rendered set to learn, unless its dials are given.
_SOURCE_DIALS: Mapping[str, Mapping[str, Any]] = {"synthetic": {"seed": 50}}


@dataclass(frozen=True)
class Arguments:
    """Those arguments of ``train`` that decide what is learned, as they were given; None where they were left out.

    Raises:
        TypeError: a reader's options are not a mapping.
    """

    dataset: "str | os.PathLike | ReIDDataset | None"
    method: str | type[Recipe] | None
    root: str | os.PathLike | None
    data: Mapping[str, Any] | None
    source_data: Mapping[str, Any] | None
    overrides: Mapping[str, Any]

    def __post_init__(self) -> None:
        for argument in ("data", "source_data"):
            options = getattr(self, argument)
            if not isinstance(options, Mapping | None):
                raise TypeError(f"train: {argument} must map a reader's options to values, got {options!r}")

    def completed(self, stored: Mapping[str, Any]) -> "Arguments":
        """With what was left out taken from ``stored``, the settings of the run that is resumed.

        Raises:
            ValueError: a run knows the name of a ready data set or of a method of one's own, but not the thing itself.
        """
        run = stored["run"]
        if self.dataset is None and not run["dataset"]:
            raise ValueError("train: dataset must be given again for a run that was given a ready one, got None")
        return dataclasses.replace(
            self,
            dataset=run["dataset"] if self.dataset is None else self.dataset,
            method=stored_method("train", "settings", run["method"], to_train=True)
            if self.method is None
            else self.method,
            data=stored["data"] if self.data is None else self.data,
            source_data=stored["source_data"] if self.source_data is None else self.source_data,
        )


@dataclass(frozen=True)
class Experiment:
    """What a training learns, by which method and settings, and where its data lie.

    Attributes:
        recipe_class, config: the method and its settings.
        dataset: the set to learn: a name, an absolute path, or a ready set.
        name: the set's name or absolute path; empty for a ready one.
        root, source_root: where the set to learn and the labelled set are looked for; None = in the usual places.
        data, source_data: options of their readers.
        run: the [run] table of the run that is resumed; empty for a new one.
    """

    recipe_class: type[Recipe]
    config: Config
    dataset: "str | os.PathLike | ReIDDataset"
    name: str
    root: str | os.PathLike | None
    source_root: str | os.PathLike | None
    data: Mapping[str, Any]
    source_data: Mapping[str, Any]
    run: Mapping[str, Any]

    def settings(
        self, target: "ReIDDataset", source: "ReIDDataset | None", device: torch.device
    ) -> dict[str, dict[str, Any]]:
        """The tables of ``config.toml``; the sets tell where they were found."""
        run = dict(self.run) or {
            "method": self.recipe_class.name, "dataset": self.name, "fastreid_u": package_version(),
            "torch": torch.__version__, "device": str(device), "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        run |= {"root": os.path.abspath(target.root), "source_root": source and os.path.abspath(source.root)}
        options = {"data": dict(self.data), "source_data": dict(self.source_data)}
        return {"run": run, "config": self.config.to_dict(), **options}


def experiment_of(arguments: Arguments, stored: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment that ``arguments`` name; with ``stored``, the settings of a run, that run's.

    Raises:
        ValueError, TypeError: unknown method, option or kind of data set, or a value out of range.
        ValueError: a resumed run was given settings that would make it another experiment.
    """
    return _new_experiment(arguments) if stored is None else _resumed_experiment(arguments.completed(stored), stored)


def _new_experiment(arguments: Arguments) -> Experiment:
    from fastreid_u.data import ReIDDataset

    dataset, root = arguments.dataset, arguments.root
    recipe_class = get_method("cluster_contrast" if arguments.method is None else arguments.method)
    if isinstance(dataset, ReIDDataset) and arguments.data:
        raise ValueError(f"train: data must be left out with a ready dataset, got {dict(arguments.data)}")
    name = _dataset_name(arguments)
    known = dataset.name if isinstance(dataset, ReIDDataset) else name
    overrides = _named_overrides(arguments)
    config = fitted_to_network(recipe_class.Config.for_dataset(known, **overrides), overrides)
    return _experiment(arguments, recipe_class, config, name, ({}, root, root))


def _resumed_experiment(arguments: Arguments, stored: Mapping[str, Any]) -> Experiment:
    """The experiment of the run that has the settings ``stored``; ``arguments`` have been completed with them."""
    recipe_class, name, run = get_method(arguments.method), _dataset_name(arguments), stored["run"]
    config = _resumed_config(stored, recipe_class, _named_overrides(arguments))
    root = source_root = arguments.root
    if root is None:
        root = stored_root(name, run["root"])
        source_root = stored_root(getattr(config, "source", None) or "", run.get("source_root"))
    return _experiment(arguments, recipe_class, config, name, (run, root, source_root))


def _experiment(
    arguments: Arguments, recipe_class: type[Recipe], config: Config, name: str, origin: tuple[Mapping, Any, Any]
) -> Experiment:
    """With the data sets' options; ``origin`` is the run that is resumed and where both sets are looked for."""
    from fastreid_u.data import known_name

    source, (run, root, source_root) = getattr(config, "source", None), origin
    source_data = dict(arguments.source_data or {})
    if source is not None:
        source_data = {**_SOURCE_DIALS.get(known_name(source), {}), **source_data}
    data = dict(arguments.data or {})
    return Experiment(recipe_class, config, arguments.dataset, name, root, source_root, data, source_data, run)


def _dataset_name(arguments: Arguments) -> str:
    """The set's name or absolute path; empty for a ready one."""
    from fastreid_u.data import ReIDDataset

    ready = isinstance(arguments.dataset, ReIDDataset)
    return "" if ready else absolute_name("dataset", arguments.dataset, arguments.root)


def _named_overrides(arguments: Arguments) -> dict[str, Any]:
    """The overrides, with ``source`` as a name or an absolute path."""
    overrides = dict(arguments.overrides)
    if overrides.get("source") is not None:
        overrides["source"] = absolute_name("source", overrides["source"], arguments.root)
    return overrides


def absolute_name(argument: str, value: object, root: str | os.PathLike | None) -> str:
    """The name of a known set, or the absolute path of a folder or file: both name the same from any directory."""
    from fastreid_u.data import known_name
    from fastreid_u.data.catalogue import data_root

    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"train: {argument} must be a name, a path or a ready data set, got {value!r}")
    text = os.fspath(value)
    places = (Path(text).expanduser(), data_root(root) / text) if text and not known_name(text) else ()
    return known_name(text) or next((os.path.abspath(place) for place in places if place.exists()), text)


def stored_method(op: str, place: str | os.PathLike, method: object, *, to_train: bool) -> str:
    """``method`` as the settings or the model at ``place`` name it: the name of a method, and nothing to import.

    A file or module that a run folder names is never imported, for the folder may come from someone else. So a run of
    one's own method has a network that can be used, but ``to_train`` it the caller gives the method again.

    Raises:
        ValueError: it is no name, or not that of one of our methods, ``to_train``; the message begins with ``op``.
    """
    if to_train and method not in methods():
        raise ValueError(
            f"{op}: method must be given again, as FILE.py:CLASS or the class, for a run of one's own method "
            f"({method!r}), got None; in the shell, repeat --method FILE.py:CLASS"
        )
    if not isinstance(method, str) or ":" in method:
        raise ValueError(f"{op}: {place} must hold the name of a method, as train wrote it, got {method!r}")
    return method


def stored_root(name: str, root: str | None) -> str | None:
    """The ``root`` with which ``load_dataset(name, root)`` finds again the set that a run found in its ``root``.

    None, the usual places, where the data have moved, and for folders and files, whose name is their path.
    """
    from fastreid_u.data import known_name

    known = known_name(name)
    if known is None or root is None:
        return None
    root = os.path.dirname(root) if known == "synthetic" else root  # "synthetic" takes the folder above its renderings
    return root if os.path.isdir(root) else None


def _resumed_config(stored: Mapping[str, Any], recipe_class: type[Recipe], overrides: Mapping[str, Any]) -> Config:
    """The run's settings, with what a resumed run may change changed."""
    if stored["run"]["method"] != recipe_class.name:
        raise ValueError(f"train: method must be the run's own ({stored['run']['method']}), got {recipe_class.name!r}")
    values = {}
    for field in dataclasses.fields(recipe_class.Config):  # None is written as a comment, hence absent
        default = False if field.default is False else None  # a switch of a younger version was off
        values[field.name] = stored["config"].get(field.name, default)
    overrides = {name: plain(value) for name, value in overrides.items()}
    changed = {k: v for k, v in overrides.items() if k not in RESUMABLE and values.get(k) != v}
    if changed:
        raise ValueError(
            f"train: a resumed run must keep its settings (only {', '.join(sorted(RESUMABLE))} may change), got "
            + ", ".join(f"{k}={v!r} instead of {values.get(k)!r}" for k, v in changed.items())
        )
    try:
        recipe_class.Config.for_dataset("", **values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"train: config.toml must hold settings of method {recipe_class.name!r}, got {error}"
        ) from error
    return recipe_class.Config.for_dataset("", **{**values, **overrides})


def package_version() -> str:
    try:
        return version("fastreid-u")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"

# SPDX-License-Identifier: Apache-2.0
"""From what ``train`` was told to what the epochs work with: data, network, loaders."""

import dataclasses
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u.config import Config
from fastreid_u.engine.device import uses_bfloat16
from fastreid_u.engine.display import Display, Phase
from fastreid_u.engine.evaluate import test_split
from fastreid_u.engine.extract import BadImageLog
from fastreid_u.engine.loop import Session, SourceLoaders
from fastreid_u.engine.resume import fingerprint
from fastreid_u.recipe import Images, Recipe

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset
    from fastreid_u.models import ReIDModel


def located(argument: str, value: object, root: str | os.PathLike | None) -> str:
    """The name of a known set, or the absolute path of a folder or file: what still says the same elsewhere."""
    from fastreid_u.data import known_name
    from fastreid_u.data.catalogue import data_root

    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"train: {argument} must be a name, a path or a ready data set, got {value!r}")
    text = os.fspath(value)
    places = (Path(text).expanduser(), data_root(root) / text) if text and not known_name(text) else ()
    return known_name(text) or next((os.path.abspath(place) for place in places if place.exists()), text)


def load(
    dataset: str | os.PathLike, root: str | os.PathLike | None, data: Mapping[str, Any] | None, display: Display
) -> "ReIDDataset":
    from fastreid_u.data import load_dataset

    with ExitStack() as stack:
        phase: Phase | None = None

        def progress(done: int, total: int) -> None:
            nonlocal phase
            if phase is None:
                display.line(f"rendering {total:,} images, once for these dials")
                phase = stack.enter_context(display.phase("render", total))
            phase(done - phase.done)

        return load_dataset(dataset, root, progress=progress, **dict(data or {}))


# A rendered source has other people and cameras than the rendered set to learn, unless its dials say otherwise.
SOURCE_DIALS: Mapping[str, Mapping[str, Any]] = {"synthetic": {"seed": 50}}


def load_source(
    recipe_class: type[Recipe],
    config: Config,
    root: str | os.PathLike | None,
    data: Mapping[str, Any] | None,
    display: Display,
) -> "ReIDDataset | None":
    """The labelled set of a method that uses one, without images whose identity is unknown."""
    if not hasattr(config, "source"):
        if data:
            raise ValueError(f"train: source_data must be left out for method {recipe_class.name!r}, got {dict(data)}")
        return None
    if config.source is None:
        raise ValueError(f"train: source must name a labelled set for method {recipe_class.name!r}, got None")
    reid = load(config.source, root, data, display)
    named = tuple(sample for sample in reid.train if sample.pid >= 0) if reid.has_pids else ()
    if not named:
        raise ValueError(f"train: source must have training images with identities, got none in {reid.root}")
    return dataclasses.replace(reid, train=named)


def build_network(config: Config, device: torch.device, *, trained: bool) -> "ReIDModel":
    """The network; one that was trained has its weights in the run, and those that it began with may be gone."""
    from fastreid_u.models import build_model

    model = build_model(
        config.arch, pooling=config.pooling_type, weights=None if trained else config.weights, bn_group=config.bn_group,
        bn_running=config.bn_running, stem_relu=config.stem_relu, drop_path=config.drop_path,
        image_size=(config.height, config.width), seed=config.seed,
    )  # fmt: skip
    if trained:
        model.card["weights"] = f"{config.weights or 'random'}, as trained so far"
    return model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)


def open_session(
    recipe: Recipe,
    reid: "ReIDDataset",
    labelled: "ReIDDataset | None",
    device: torch.device,
    display: Display,
    folder: Path,
) -> Session:
    from fastreid_u.data import PixelCache, make_loader, test_transform

    config = recipe.config
    if config.center_per_camera and not reid.has_cameras:
        display.line("warning: center_per_camera has no effect: these data have no camera ids, or one camera only")
    plain = test_transform(config.height, config.width, **config.pixel_statistics())
    augmented = recipe.views()

    def loaders(samples):
        cache: bool | PixelCache = False
        if config.cache_images:  # one cache for both loaders of the same images
            cache = PixelCache(len(samples), config.height, config.width, shared=config.workers > 0)
        common = dict(workers=config.workers, seed=config.seed, cache=cache, pin_memory=device.type == "cuda")
        return (
            make_loader(samples, plain, batch_size=config.eval_batch_size, **common),
            make_loader(samples, augmented, batch_size=config.batch_size, **common),
        )

    split = test_split(reid, display)
    unaugmented, shown = loaders(reid.train)
    return Session(
        recipe=recipe,
        dataset=reid,
        split=split,
        plain=unaugmented,
        augmented=shown,
        source=SourceLoaders(labelled.train, *loaders(labelled.train), BadImageLog(len(labelled.train), display))
        if labelled
        else None,
        ranked=make_loader(
            split.samples, plain, batch_size=config.eval_batch_size, workers=config.workers, cache=config.cache_images,
            seed=config.seed, pin_memory=device.type == "cuda",
        ) if split else None,
        bad_train=BadImageLog(len(reid.train), display),
        bad_test=BadImageLog(len(split.samples), display) if split else None,
        device=device,
        autocast=uses_bfloat16(config.amp, device),
        display=display,
        folder=folder,
        data=fingerprint(reid, labelled),
    )  # fmt: skip


def images_of(reid: "ReIDDataset", source: "ReIDDataset | None" = None) -> Images:
    """What a recipe may know of the set to learn, and of the labelled ``source`` with its identities, 0 .. P - 1."""
    images = Images(len(reid.train), torch.tensor([s.camid for s in reid.train]) if reid.has_cameras else None)
    if source is not None:
        images.source = images_of(source)
        images.source.pids = torch.tensor([s.pid for s in source.train]).unique(return_inverse=True)[1]
    return images

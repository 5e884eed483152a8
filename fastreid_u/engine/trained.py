# SPDX-License-Identifier: Apache-2.0
"""A trained network put to use: load it from a run, evaluate it on a data set, extract features of any images."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastreid_u.config import pixel_statistics
from fastreid_u.engine.checkpoint import load_model_file
from fastreid_u.engine.device import pick_device, uses_bfloat16
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import evaluate_split, test_split
from fastreid_u.engine.extract import BadImageLog, extract_features
from fastreid_u.engine.report import metric_block
from fastreid_u.engine.resume import place, refuse_import, stored_tables

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset, Sample, View
    from fastreid_u.models import ReIDModel


class Extracted(NamedTuple):
    """Features of images, in the order of ``paths``; rows of unreadable images are NaN and named in ``bad``."""

    features: Tensor
    paths: list[str]
    bad: dict[str, str]


# What a model's header must say for the network to be built and fed.
_NEEDED = (
    "arch", "pooling_type", "stem_relu", "height", "width", "pixel_norm", "channels_last", "amp", "ap",
    "eval_batch_size",
)  # fmt: skip


def load_model(
    run: str | os.PathLike, *, which: str = "last", device: str | torch.device | None = "cpu"
) -> "tuple[ReIDModel, dict[str, Any]]":
    """The network of a run folder (``which`` = "last" or "best") or of a ``model_*.safetensors`` file, and what it is.

    The description holds method, data set, epoch, mAP and the whole config. The network is float32, in eval mode, and
    maps (B, 3, height, width) normalised images to (B, D) unit features. No pickle is read.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: not a model that a run wrote, or no such device.
    """
    from fastreid_u.models import build_model

    if which not in ("last", "best"):
        raise ValueError(f"load_model: which must be 'last' or 'best', got {which!r}")
    path = _path("load_model", run)
    device = pick_device("load_model", device)
    if path.is_dir():
        path = path / f"model_{which}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"load_model: run must be a run folder or a model file, got {run} (no {path})")
    try:
        tensors, about = load_model_file(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"load_model: {path} must be described by JSON in its header, got {error}") from error
    config = about.get("config") if isinstance(about, dict) else None
    missing = [name for name in _NEEDED if not isinstance(config, dict) or name not in config]
    if missing:
        raise ValueError(f"load_model: {path} must describe its network in its header, got no {', '.join(missing)}")
    refuse_import("load_model", path, about.get("method", ""))
    with torch.inference_mode(False):  # or whoever loads it under inference_mode could never train it
        model = build_model(
            config["arch"], pooling=config["pooling_type"], weights=None, stem_relu=config["stem_relu"],
            image_size=(config["height"], config["width"]),
        )  # fmt: skip
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"load_model: {path} must hold the weights of {config['arch']}, got {error}") from error
        # As in training, so that figures are equal to the bit.
        layout = torch.channels_last if config["channels_last"] else torch.contiguous_format
        model = model.to(device, torch.float32, memory_format=layout)
    return model.eval(), about


def evaluate(
    run: str | os.PathLike,
    dataset: "str | os.PathLike | ReIDDataset | None" = None,
    *,
    root: str | os.PathLike | None = None,
    data: Mapping[str, Any] | None = None,
    which: str = "last",
    ap: str | None = None,
    batch_size: int | None = None,
    workers: int = 4,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """mAP, mINP and CMC of a trained network, printed and returned as fractions.

    Precision, batch size and formula are the run's own, so on a CPU the figures of an epoch come out again exactly.

    Args:
        run: run folder or model file.
        dataset: as for ``train``; default the set that the network was trained on, where the run's folder knows it.
        root: as for ``train``; with the default ``dataset``, the place where the run found it.
        data: the reader's options; with the default ``dataset`` they change the run's own.
        ap: "rank", "sklearn" or "trapezoid", the three formulas in use (equal only without ties; the last differs).
        batch_size: images per batch; changes speed, and figures in the last bits.
        which, workers, device, quiet: as for ``train`` and ``load_model``.

    Raises:
        ValueError: the data set has neither a query/gallery split nor known identities, or no query has a match; or
            ``dataset`` must be named: the run was given a ready ``ReIDDataset``, or a model file lies alone.
        FileNotFoundError: no such run, or its data are no longer where they were.
    """
    from fastreid_u.data import ReIDDataset, load_dataset, make_loader

    if data is not None and not isinstance(data, Mapping):
        raise TypeError(f"evaluate: data must be a mapping of the reader's options, got {data!r}")
    if isinstance(dataset, ReIDDataset) and (data or root is not None):
        raise ValueError(f"evaluate: root and data must be left out with a ready dataset, got {root!r} and {data!r}")
    device = pick_device("evaluate", device)
    model, about = load_model(run, which=which, device=device)
    config = about["config"]
    if dataset is None:
        dataset, root, data = _own_dataset(run, root, data)
    if not isinstance(dataset, ReIDDataset):
        dataset = load_dataset(dataset, root, **dict(data or {}))
    display = Display(quiet=quiet)
    split = test_split(dataset, display)
    if split is None:
        raise ValueError(f"evaluate: dataset must have a query/gallery split or known identities, got {dataset.root}")
    size = config["eval_batch_size"] if batch_size is None else batch_size
    loader = make_loader(split.samples, _plain_view(config), batch_size=size, workers=workers)
    log = BadImageLog(len(split.samples), display)
    with closing(loader), display.hearing_warnings():
        metrics = evaluate_split(
            model, loader, split, ap=config["ap"] if ap is None else ap, display=display, log=log, device=device,
            autocast=uses_bfloat16(config["amp"], device),
        )  # fmt: skip
    if not metrics["queries"]:
        elsewhere = " in another camera" if split.has_cameras else ""
        raise ValueError(f"evaluate: dataset must hold a query with a match{elsewhere}, got none in {dataset.root}")
    for line in metric_block(metrics):
        display.line(line)
    return metrics


def _path(op: str, run: str | os.PathLike) -> Path:
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"{op}: run must be a path, got {run!r}")
    return Path(run).expanduser()


def _plain_view(config: Mapping[str, Any]) -> "View":
    from fastreid_u.data import test_transform

    return test_transform(config["height"], config["width"], **pixel_statistics(config["pixel_norm"]))


def _own_dataset(
    run: str | os.PathLike, root: str | os.PathLike | None, data: Mapping[str, Any] | None
) -> tuple[str, str | os.PathLike | None, dict[str, Any]]:
    """Name, root and reader's options of the set that a network was trained on; what is given goes before."""
    from fastreid_u.data import known_name

    path = _path("evaluate", run)
    file = (path if path.is_dir() else path.parent) / "config.toml"
    if not file.exists():  # the model's header holds a name, but not the options, and the name may be anyone's
        raise ValueError(
            f"evaluate: dataset must be given for a model file outside its run's folder, got none for {run}"
        )
    told = stored_tables("evaluate", file.parent)
    refuse_import("evaluate", file, told["run"]["method"])
    name, options = told["run"]["dataset"], told["data"]
    known = known_name(name)
    if known is None and not os.path.isabs(name):  # empty for a ready ReIDDataset
        raise ValueError(f"evaluate: dataset must be given for a run that was given a ready one, got none for {run}")
    if known is None and root is not None:
        raise ValueError(
            f"evaluate: root must be left out for the run's own folder {name}, got {root}; name the dataset"
        )
    return name, place(name, told["run"]["root"]) if root is None else root, {**options, **dict(data or {})}


def extract(
    run: str | os.PathLike,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    which: str = "last",
    batch_size: int | None = None,
    workers: int = 4,
    device: str | torch.device | None = None,
    quiet: bool = True,
) -> Extracted:
    """Unit features of images, in the precision that the network was trained in.

    Args:
        run: run folder or model file.
        images: a folder (every image below it, sorted by path, whatever its sub-folders are called), an image file, a
            CSV file or the name of a known set (train, query and gallery in turn, without junk), or a list of files.
        batch_size: images per batch, default the run's own; changes speed, and features in the last bits.
        which, workers, device, quiet: as for ``train`` and ``load_model``.

    Returns:
        ``Extracted``: features (N, D) float32 on ``device``, the N paths in the same order, and unreadable images.

    Raises:
        ValueError: no image, or none that can be read.
        FileNotFoundError: no such run or images.
    """
    from fastreid_u.data import make_loader

    device = pick_device("extract", device)
    samples = _samples(images)
    if not samples:
        raise ValueError(f"extract: images must name at least one file, got none in {images!r}")
    model, about = load_model(run, which=which, device=device)
    config = about["config"]
    display = Display(quiet=quiet)
    size = config["eval_batch_size"] if batch_size is None else batch_size
    loader = make_loader(samples, _plain_view(config), batch_size=size, workers=workers)
    log = BadImageLog(len(samples), display, share=1.0)
    with closing(loader), display.hearing_warnings():
        features = extract_features(
            model, loader, samples, display=display, log=log, device=device,
            autocast=uses_bfloat16(config["amp"], device),
        )  # fmt: skip
    return Extracted(features, [sample.path for sample in samples], log.reasons)


def _samples(images: str | os.PathLike | Sequence[str | os.PathLike]) -> "tuple[Sample, ...]":
    """What ``images`` names. A folder's is not read as a data set, which leaves out images that are in no split."""
    from fastreid_u.data import Sample, known_name, load_dataset
    from fastreid_u.data.catalogue import data_root
    from fastreid_u.data.locate import IMAGE_SUFFIXES, list_images

    if isinstance(images, str | os.PathLike):
        path = Path(images).expanduser()
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            images = [path]
        elif known_name(images) is None and os.fspath(images):
            folder = next((place for place in (path, data_root(None) / path) if place.is_dir()), None)
            images = images if folder is None else list_images(folder, recursive=True)
    if isinstance(images, str | os.PathLike):
        reid = load_dataset(os.fspath(images))
        return reid.train + reid.query + reid.gallery
    if not isinstance(images, Iterable):
        raise TypeError(f"extract: images must be a folder, a CSV file, a known set or a list of files, got {images!r}")
    return tuple(Sample(os.fspath(path), -1, 0) for path in images)

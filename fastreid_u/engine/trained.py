# SPDX-License-Identifier: Apache-2.0
"""A trained network put to use: load it from a run, evaluate it on a data set, extract features of any images."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastreid_u.config import load_toml, pixel_statistics
from fastreid_u.engine.checkpoint import load_model_file
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import evaluate_split, test_split
from fastreid_u.engine.extract import BadImageLog, extract_features
from fastreid_u.engine.report import metric_block

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset, View
    from fastreid_u.models import ReIDModel


class Extracted(NamedTuple):
    """Features of images, in the order of ``paths``; rows of unreadable images are NaN and named in ``bad``."""

    features: Tensor
    paths: list[str]
    bad: dict[str, str]


def load_model(
    run: str | os.PathLike, *, which: str = "last", device: str | torch.device = "cpu"
) -> "tuple[ReIDModel, dict[str, Any]]":
    """The network of a run folder (``which`` = "last" or "best") or of a ``model_*.safetensors`` file, and what it is.

    The description holds method, data set, epoch, mAP and the whole config. The network is in eval mode and maps
    (B, 3, height, width) normalised images to (B, D) unit features. No pickle is read.
    """
    from fastreid_u.models import build_model

    if which not in ("last", "best"):
        raise ValueError(f"load_model: which must be 'last' or 'best', got {which!r}")
    path = Path(run)
    if path.is_dir():
        path = path / f"model_{which}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"load_model: run must be a run folder or a model file, got {run} (no {path})")
    tensors, about = load_model_file(path)
    config = about["config"]
    model = build_model(
        config["arch"], pooling=config["pooling_type"], weights=None, stem_relu=config["stem_relu"],
        image_size=(config["height"], config["width"]),
    )  # fmt: skip
    model.load_state_dict(tensors)
    return model.to(device).eval(), about


def evaluate(
    run: str | os.PathLike,
    dataset: "str | os.PathLike | ReIDDataset | None" = None,
    *,
    root: str | os.PathLike | None = None,
    data: Mapping[str, Any] | None = None,
    which: str = "last",
    ap: str = "rank",
    batch_size: int = 256,
    workers: int = 4,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """mAP, mINP and CMC of a trained network, printed and returned as fractions.

    Args:
        run: run folder or model file.
        dataset: as for ``train``; default the set that the network was trained on.
        ap: "rank", "sklearn" or "trapezoid", the three formulas in use (equal only without ties; the last differs).
        root, data, which, batch_size, workers, device, quiet: as for ``train`` and ``load_model``.

    Raises:
        ValueError: the data set has neither a query/gallery split nor known identities.
    """
    from fastreid_u.data import ReIDDataset, load_dataset, make_loader

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, about = load_model(run, which=which, device=device)
    config = about["config"]
    if dataset is None:
        dataset, data = _own_dataset(run, about, data)
    if not isinstance(dataset, ReIDDataset):
        dataset = load_dataset(dataset, root, **dict(data or {}))
    display = Display(quiet=quiet)
    split = test_split(dataset, display)
    if split is None:
        raise ValueError(f"evaluate: dataset must have a query/gallery split or known identities, got {dataset.root}")
    loader = make_loader(split.samples, _plain_view(config), batch_size=batch_size, workers=workers)
    log = BadImageLog(len(split.samples), display)
    metrics = evaluate_split(model, loader, split, ap=ap, display=display, log=log, device=device)
    for line in metric_block(metrics):
        display.line(line)
    return metrics


def _plain_view(config: Mapping[str, Any]) -> "View":
    from fastreid_u.data import test_transform

    return test_transform(config["height"], config["width"], **pixel_statistics(config["pixel_norm"]))


def _own_dataset(
    run: str | os.PathLike, about: dict[str, Any], data: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """Name and reader's options of the set that a network was trained on; a lone model file knows the name only."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    if not (folder / "config.toml").exists():
        return about["dataset"], dict(data or {})
    told = load_toml((folder / "config.toml").read_text(encoding="utf-8"))
    return told["run"]["dataset"], {**told["data"], **dict(data or {})}


def extract(
    run: str | os.PathLike,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    which: str = "last",
    batch_size: int = 256,
    workers: int = 4,
    device: str | torch.device | None = None,
    quiet: bool = True,
) -> Extracted:
    """Unit features of a folder of crops or of a list of image files.

    Returns:
        ``Extracted``: features (N, D) float32 on ``device``, the N paths in the same order, and unreadable images.
    """
    from fastreid_u.data import Sample, load_dataset, make_loader

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(images, str | os.PathLike):
        samples = load_dataset(os.fspath(images)).train
    else:
        samples = tuple(Sample(os.fspath(path), -1, 0) for path in images)
    if not samples:
        raise ValueError("extract: images must name at least one file, got none")
    model, about = load_model(run, which=which, device=device)
    config = about["config"]
    display = Display(quiet=quiet)
    loader = make_loader(samples, _plain_view(config), batch_size=batch_size, workers=workers)
    log = BadImageLog(len(samples), display)
    features = extract_features(model, loader, samples, display=display, log=log, device=device)
    return Extracted(features, [sample.path for sample in samples], log.reasons)

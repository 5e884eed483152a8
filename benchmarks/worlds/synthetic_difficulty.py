# SPDX-License-Identifier: Apache-2.0
"""How hard is the rendered data set? What colours, pixels and random weights reach, and what labels would.

    python benchmarks/worlds/synthetic_difficulty.py --seed 100
    python benchmarks/worlds/synthetic_difficulty.py --seed 100 --shift 1.0 --training none

mAP and top-1 on the test split, images of the query's own camera and identity left out. The supervised row is the
library's own loop with the true identities in place of the clusters: same network, loss, views and batches, so what
separates it from the unsupervised row is the labels alone. Seconds are of extraction, clustering and training,
evaluation left out.
"""

import argparse
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import fastreid_u
from fastreid_u.config import Config
from fastreid_u.data import ReIDDataset, load_dataset
from fastreid_u.data.synthetic import SyntheticConfig
from fastreid_u.labels.generator import LabelGenerator
from fastreid_u.recipe import Images, Recipe
from fastreid_u.recipes.cluster_contrast import ClusterContrast

STRIPES = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", choices=("none", "supervised", "both"), default="both")
    parser.add_argument("--epochs", type=int, help="default: those of the synthetic recipe")
    parser.add_argument("--root", type=Path, help="where data sets are rendered and cached")
    for field in fields(SyntheticConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    options = vars(parser.parse_args())
    training, epochs, root = (options.pop(name) for name in ("training", "epochs", "root"))
    changed = {
        field.name: options[field.name] for field in fields(SyntheticConfig) if options[field.name] != field.default
    }
    dataset = load_dataset("synthetic", root, **changed)
    print(f"dials other than the default: {changed or 'none'}")
    print(f"{len(dataset.train)} train, {len(dataset.query)} query, {len(dataset.gallery)} gallery images\n")
    print(f"{'':32}{'mAP %':>7}{'top-1 %':>9}{'s':>7}")
    baselines(dataset)
    if training != "none":
        learned(dataset, training == "both", epochs)
    return 0


def baselines(dataset: ReIDDataset) -> None:
    query, gallery = (
        np.stack([np.asarray(Image.open(s.path)) for s in split]) for split in (dataset.query, dataset.gallery)
    )
    row(
        "random ranking",
        *score(dataset, *(np.random.default_rng(0).normal(size=(len(x), 64)) for x in (query, gallery))),
    )
    for name, describe in (("raw pixels, mean removed", pixels), ("RGB histograms", rgb), ("HSV histograms", hsv)):
        row(name, *score(dataset, describe(query), describe(gallery)))


def learned(dataset: ReIDDataset, unsupervised: bool, epochs: int | None) -> None:
    shared: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    trials = [
        ("supervised", supervised(dataset, ClusterContrast), {}),
        ("unsupervised", ClusterContrast, {"center_per_camera": True}),
    ]
    trials.append(("unsupervised, not centred", ClusterContrast, {"center_per_camera": False}))
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, method, own) in enumerate(trials if unsupervised else trials[:1]):
            place = Path(folder) / str(number)
            run = fastreid_u.train(
                dataset, method=method, logs_dir=place, quiet=True, eval_initial=True, **shared, **own
            )
            if number == 0:
                row(f"untrained {run.config.arch}", run.records[0]["mAP"], run.records[0]["top1"])
            seconds = sum(
                r.get("seconds", {}).get(part, 0) for r in run.records for part in ("extract", "label", "fit")
            )
            row(f"{name}, {run.config.epochs} epochs", run.last["mAP"], run.last["top1"], seconds)


def supervised(dataset: ReIDDataset, method: type[Recipe]) -> type[Recipe]:
    """``method`` with the true identities in place of clusters."""

    class Supervised(method):
        name = "supervised"

        def __init__(self, config: Config, images: Images) -> None:
            super().__init__(config, images)
            self.labels = TrueIdentities(config, images, dataset)

    return Supervised


class TrueIdentities(LabelGenerator):
    """Labels that are known, of ``dataset``'s training images."""

    def __init__(self, config: Config, images: Images, dataset: ReIDDataset) -> None:
        super().__init__(config, images)
        self.pids = torch.tensor([sample.pid for sample in dataset.train]).unique(return_inverse=True)[1]

    def cluster(self, features: torch.Tensor, epoch: int) -> torch.Tensor:
        return self.pids[self.images.readable].to(features.device)

    def describe(self) -> str:
        return "true identities"


def score(dataset: ReIDDataset, query: np.ndarray, gallery: np.ndarray) -> tuple[float, float]:
    x, y = (F.normalize(torch.from_numpy(f).float(), dim=1) for f in (query, gallery))
    pids, camids = ([torch.tensor([s[i] for s in split]) for split in (dataset.query, dataset.gallery)] for i in (1, 2))
    metrics = fastreid_u.rank_metrics(x, y, *pids, *camids)
    return float(metrics.mAP), float(metrics.cmc[0])


def pixels(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32)
    return flat - flat.mean(axis=1, keepdims=True)


def rgb(images: np.ndarray) -> np.ndarray:
    return np.stack([histogram(image, (6, 6, 6)) for image in images])


def hsv(images: np.ndarray) -> np.ndarray:
    return np.stack([histogram(np.asarray(Image.fromarray(image).convert("HSV")), (8, 4, 4)) for image in images])


def histogram(image: np.ndarray, bins: tuple[int, int, int]) -> np.ndarray:
    """Square roots (the Hellinger kernel) of joint colour histograms of horizontal stripes."""
    parts = [part.reshape(-1, 3) for part in np.array_split(image, STRIPES)]
    return np.sqrt(
        np.concatenate([np.histogramdd(part, bins, [(0, 256)] * 3)[0].ravel() / len(part) for part in parts])
    )


def row(name: str, mean_ap: float, top1: float, seconds: float | None = None) -> None:
    print(f"{name:32}{100 * mean_ap:7.1f}{100 * top1:9.1f}{'' if seconds is None else f'{seconds:7.0f}'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""One epoch of Cluster Contrast by phase, beside the published pipeline on the same images from the same weights.

    pytest benchmarks/bench_epoch.py --benchmark-only -k 5k

``published/`` restates that pipeline. It goes first, so that nothing that ours sets up can help it, and runs one epoch:
it keeps nothing from one to the next. Ours is ``fastreid_u.train`` for two epochs, of which the second counts, as a
real run has fifty; the first, which decodes the images, stands beside it. Both draw the same images into the same
batches. Saving a run is in neither.

Nothing is reported unless the features of the two networks are equal to 1e-4, our labels of its features are its
labels, and our mAP of its features is its mAP to 1e-6.

The images are rendered, the network is the trained one of ``trained_features.py``. $FASTREID_U_CACHE keeps both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trained_features
from published.evaluate import distances, rank
from published.extract import extract
from published.fit import fit, optimizer_of
from published.images import Sample
from published.label import label
from published.memory import Memory, centroids
from torch import Tensor

import fastreid_u
from fastreid_u.data import ReIDDataset, load_dataset
from fastreid_u.data.samplers import RandomMultipleGallery, iterations
from fastreid_u.data.synthetic import SyntheticConfig, generate
from fastreid_u.models import build_model

PHASES = ("extract", "label", "fit", "evaluate")
SEED = 1


@dataclass(frozen=True)
class Size:
    """A rendered world, and the settings of a run on it: the published ones, but for what a CPU has no time for."""

    world: dict[str, Any]
    batch_size: int = 256
    num_instances: int = 16
    iters: int = 20  # about one pass over the images, as the scripts do where no number is given
    workers: int = 2
    height: int = 128
    width: int = 64
    k1: int = 30
    k2: int = 6
    eps: float = 0.6
    pretrained: bool = True  # by trained_features.py; else by an epoch on the world itself
    rest: dict[str, Any] = field(default_factory=lambda: dict(temp=0.05, momentum=0.1, min_samples=4, lr=3.5e-4))


SIZES = {
    "tiny": Size(
        dict(train_ids=8, test_ids=4, cameras=3, images_per_camera=4, distractors=1, height=64, width=32),
        batch_size=16, num_instances=4, iters=2, workers=0, height=64, width=32, k1=8, k2=3, pretrained=False,
    ),
    "5k": Size(dict(train_ids=265, test_ids=130, seed=78)),
}  # fmt: skip


def settings(size: Size) -> dict[str, Any]:
    """What ``train`` is told: the published recipe on one machine without a GPU, decoded images kept."""
    return dict(
        arch="resnet10", height=size.height, width=size.width, batch_size=size.batch_size, iters=size.iters,
        num_instances=size.num_instances, k1=size.k1, k2=size.k2, eps=size.eps, workers=size.workers, bn_group=None,
        cache_images=True, eval_step=1, eval_initial=False, seed=SEED, device="cpu", quiet=True, **size.rest,
    )  # fmt: skip


def data_of(size: Size) -> ReIDDataset:
    return load_dataset("market1501", generate(SyntheticConfig(**size.world), trained_features.cache()))


def weights_of(size: Size, data: ReIDDataset, folder: Path) -> Path:
    if size.pretrained:
        return trained_features.network(256, quiet=True)
    told = settings(size) | dict(center_per_camera=True, calibrate_bn=2, epochs=1)
    return fastreid_u.train(data, weights=None, logs_dir=folder / "before", **told).folder / "model_last.safetensors"


def samples(part: Sequence[Any]) -> list[Sample]:
    return [Sample(sample.path, sample.pid, sample.camid) for sample in part]


@dataclass
class Published:
    """What an epoch of the published pipeline found, and its seconds by phase and part."""

    features: Tensor
    labels: np.ndarray
    ranked: Tensor  # features of queries and gallery
    mAP: float
    loss: float
    seconds: dict[str, float]


def published_epoch(size: Size, data: ReIDDataset, weights: Path) -> Published:
    model = build_model("resnet10", weights=weights)  # a plain nn.Module
    optimizer = optimizer_of(model, size.rest["lr"])
    train, query, gallery = (samples(part) for part in (data.train, data.query, data.gallery))
    reading = (size.height, size.width), size.batch_size, size.workers
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - begin
        return result

    features = timed("extract", lambda: extract(model, train, *reading))
    found = dict(k1=size.k1, k2=size.k2, eps=size.eps, min_samples=size.rest["min_samples"])
    labels, parts = timed("label", lambda: label(features, **found))
    memory = timed("centroids", lambda: Memory(centroids(features, labels), size.rest["temp"], size.rest["momentum"]))
    numbers = batches_of(size, data, labels)
    loss = timed("steps", lambda: fit(model, memory, optimizer, (train, labels), numbers, reading[0], size.workers))
    both = timed("test features", lambda: extract(model, query + gallery, *reading))
    q, g = both.split([len(query), len(gallery)])
    scores = timed("ranking", lambda: rank(distances(q, g), query, gallery))
    seconds |= parts
    seconds["fit"] = seconds["centroids"] + seconds["steps"]
    seconds["evaluate"] = seconds["test features"] + seconds["ranking"]
    return Published(features, labels, both, scores.mAP, loss, seconds)


def batches_of(size: Size, data: ReIDDataset, labels: np.ndarray) -> list[list[int]]:
    """The batches that ``train`` draws in its first epoch from these labels."""
    cameras = [sample.camid for sample in data.train]
    sampler = RandomMultipleGallery(labels.tolist(), cameras, size.num_instances, seed=SEED, epoch=0)
    return iterations(sampler, size.iters, size.batch_size)


def require_equal(size: Size, data: ReIDDataset, weights: Path, theirs: Published) -> dict[str, float]:
    """That ours gives what the published pipeline gives; how far the two are apart, and our seconds by part."""
    mine = fastreid_u.extract(weights, [sample.path for sample in data.train], amp="off", device="cpu").features
    apart = (mine - theirs.features).abs().max().item()
    assert apart <= 1e-4, f"features differ by {apart}"
    found = dict(k1=size.k1, k2=size.k2, eps=size.eps, min_samples=size.rest["min_samples"])
    ids = [torch.tensor([getattr(s, name) for s in data.query + data.gallery]) for name in ("pid", "camid")]
    q, g = theirs.ranked.split([len(data.query), len(data.gallery)])
    (q_pids, g_pids), (q_cams, g_cams) = (part.split([len(q), len(g)]) for part in ids)
    for _ in range(2):  # the second time counts: compiled code is read from its cache in the first
        clock = [time.perf_counter()]
        lists = fastreid_u.knn(theirs.features, size.k1)
        clock.append(time.perf_counter())
        labels = fastreid_u.pseudo_labels(theirs.features, knn=lists, **found)
        clock.append(time.perf_counter())
        fastreid_u.cluster_centroids(theirs.features, labels)
        clock.append(time.perf_counter())
        again = fastreid_u.rank_metrics(q, g, q_pids, g_pids, q_cams, g_cams, ap="sklearn").mAP
        clock.append(time.perf_counter())
    np.testing.assert_array_equal(labels.numpy(), theirs.labels)
    assert abs(again - theirs.mAP) <= 1e-6, f"mAP is {again}, published {theirs.mAP}"
    parts = dict(zip(("search", "jaccard, dbscan", "centroids", "ranking"), np.diff(clock).tolist(), strict=True))
    return {"features differ by": apart, "mAP differs by": abs(again - theirs.mAP), "parts": parts}


def figures(size: Size, data: ReIDDataset, theirs: Published, ours: Sequence[dict], equal: dict) -> dict[str, Any]:
    """The row of a table for each phase and part, seconds of both; and what was run."""
    first, last = (record["seconds"] for record in ours)
    table = {name: {"published": theirs.seconds[name], "ours": last[name], "ours, first": first[name]}
             for name in PHASES}  # fmt: skip
    whole = {name: sum(table[phase][name] for phase in PHASES) for name in table["fit"]}
    mine = equal["parts"]
    theirs.seconds["jaccard, dbscan"] = theirs.seconds["jaccard"] + theirs.seconds["dbscan"]
    return {
        "settings": {
            **{name: value for name, value in settings(size).items() if name not in ("quiet", "device", "seed")},
            "train images": len(data.train), "queries": len(data.query), "gallery": len(data.gallery),
            "threads": torch.get_num_threads(), "clusters": int(theirs.labels.max()) + 1,
        },
        "equality": {
            "features differ by": equal["features differ by"], "labels equal": True,
            "mAP differs by": equal["mAP differs by"],
        },
        "phases": {**table, "whole epoch": whole},
        "parts": {name: {"published": theirs.seconds[name], "ours": mine[name]} for name in mine},
        "ratio": whole["published"] / whole["ours"],
        "held back by": max(PHASES, key=lambda phase: table[phase]["ours"]),
    }  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def bench_epoch(benchmark, name: str, tmp_path: Path) -> None:
    size = SIZES[name]
    if torch.cuda.is_available():
        pytest.skip("make gpu times epochs on a GPU in its stage train; this one is for a CPU")
    data = data_of(size)
    weights = weights_of(size, data, tmp_path)
    theirs = published_epoch(size, data, weights)

    def run() -> Any:
        return fastreid_u.train(data, weights=weights, logs_dir=tmp_path / "run", epochs=2, **settings(size))

    equal = require_equal(size, data, weights, theirs)
    benchmark.group = f"two epochs of train, {len(data.train)} images"
    ours = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= figures(size, data, theirs, list(ours.records), equal)

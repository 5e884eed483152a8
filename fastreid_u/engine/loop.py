# SPDX-License-Identifier: Apache-2.0
"""The algorithm: extract, label, fit, evaluate, again. ``run_epochs`` reads as the papers' pseudo-code does."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastreid_u.engine import checkpoint
from fastreid_u.engine.curves import draw_curves
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import Split, evaluate_split
from fastreid_u.engine.extract import BadImageLog, extract_features
from fastreid_u.engine.fit import fit_epoch, learning_rate, make_optimizer
from fastreid_u.engine.health import label_health
from fastreid_u.engine.own_file import open_own
from fastreid_u.engine.report import table_head, table_row
from fastreid_u.recipe import Recipe

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset, ReIDLoader, Sample
    from fastreid_u.models import ReIDModel


class NoClustersError(RuntimeError):
    """Every image is un-clustered: there is nothing to train on."""


@dataclass
class SourceLoaders:
    """A labelled set to learn from as well."""

    samples: "tuple[Sample, ...]"
    plain: "ReIDLoader"
    augmented: "ReIDLoader"
    bad: BadImageLog


@dataclass
class Session:
    """One run in progress: what it uses, and what it has reached."""

    recipe: Recipe
    dataset: "ReIDDataset"
    split: Split | None
    plain: "ReIDLoader"  # training images as they are, for features
    augmented: "ReIDLoader"  # training images as the network is trained on them
    source: "SourceLoaders | None"
    ranked: "ReIDLoader | None"  # images of the split
    bad_train: BadImageLog
    bad_test: BadImageLog | None
    device: torch.device
    autocast: bool
    display: Display
    folder: Path
    data: str  # fingerprint of the training images
    optimizer: torch.optim.Optimizer | None = None  # from ``start_networks`` on
    start: int = 0
    labels: np.ndarray | None = None  # of the last finished epoch
    records: list[dict[str, Any]] = field(default_factory=list)

    def close(self) -> None:
        """End the worker processes, which an exception that somebody keeps would keep too."""
        source = (self.source.plain, self.source.augmented) if self.source else ()
        for loader in (self.plain, self.augmented, self.ranked, *source):
            if loader is not None:
                loader.close()


def run_epochs(session: Session) -> None:
    """Train from ``session.start`` to the last epoch, saving after each."""
    s, config = session, session.recipe.config
    if s.start == 0 and config.eval_initial and s.split:
        _record(s, {"epoch": -1, **_ranking(s)[0]})
    s.display.line(table_head())
    for record in s.records:
        s.display.line(table_row(record))

    for epoch in range(s.start, config.epochs):
        seconds: dict[str, float] = {}
        _reseed(s, epoch)
        with _timed(seconds, "extract"):
            features = s.recipe.features(partial(_extract, s), epoch)
        with _timed(seconds, "label"), s.display.phase("label", len(features)) as advance:
            labels = s.recipe.labels(features, epoch)
            advance(len(features))
        health = _look_at(s, labels.cpu().numpy(), epoch)

        with _timed(seconds, "fit"):
            targets = s.recipe.begin_epoch(features, labels, epoch)
            if not isinstance(targets, torch.Tensor):
                raise TypeError(f"train: begin_epoch of {s.recipe.name!r} must return (N,) targets, got {targets!r}")
            loss = fit_epoch(
                s.recipe, s.optimizer, s.augmented, s.source.augmented if s.source else None, targets, epoch,
                display=s.display, log=s.bad_train, device=s.device, autocast=s.autocast,
            )  # fmt: skip
        with _timed(seconds, "evaluate"):
            due = (epoch + 1) % config.eval_step == 0 or epoch == config.epochs - 1
            ranking, network = _ranking(s) if due else ({}, next(iter(s.recipe.ranked().values())))

        record = {
            "epoch": epoch,
            **health,
            "loss": loss,
            "lr": learning_rate(config, epoch),
            **ranking,
            "seconds": seconds,
        }
        s.labels = labels.cpu().numpy()
        _keep(s, record, network)


def start_networks(s: Session, model: "ReIDModel", *, calibrate: bool) -> None:
    """Hand ``model`` to the recipe and make the optimiser of what comes out.

    BatchNorm is calibrated first, so that whatever the recipe copies from the network has its statistics too.
    """
    config = s.recipe.config
    if calibrate and config.calibrate_bn:
        from fastreid_u.data import chunks
        from fastreid_u.models import calibrate_batchnorm

        # Any fixed spread over the images will do; batches of near-identical neighbours would not.
        order = torch.randperm(len(s.dataset.train), generator=torch.Generator().manual_seed(config.seed)).tolist()
        fixed = chunks(order, config.eval_batch_size)
        batches = (batch.images.to(s.device) for batch in s.plain.epoch(fixed))
        with torch.autocast(s.device.type, dtype=torch.bfloat16, enabled=s.autocast):
            calibrate_batchnorm(model, islice(batches, config.calibrate_bn))
    s.recipe.build(model)
    s.recipe.to(s.device)
    s.optimizer = make_optimizer([weight for weight in s.recipe.parameters() if weight.requires_grad], config)


def _extract(s: Session, network: nn.Module, *, of: str = "target") -> torch.Tensor:
    loader, samples, log, images = s.plain, s.dataset.train, s.bad_train, s.recipe.images
    if of == "source":
        loader, samples, log, images = s.source.plain, s.source.samples, s.source.bad, images.source
    features = extract_features(
        network, loader, samples, display=s.display, log=log, device=s.device, autocast=s.autocast
    )  # fmt: skip
    images.readable = torch.isfinite(features).all(dim=1).cpu()
    return features


def _ranking(s: Session) -> tuple[dict[str, Any], nn.Module]:
    """Figures of the best of the recipe's networks on the test split, and that network.

    The figures are empty if there is no split, or no query has a match, which ``rank_metrics`` has then warned of.
    """
    networks = s.recipe.ranked()
    best: dict[str, Any] = {}
    chosen = next(iter(networks.values()))
    for name, network in networks.items() if s.split else ():
        figures = evaluate_split(
            network, s.ranked, s.split, ap=s.recipe.config.ap, display=s.display, log=s.bad_test, device=s.device,
            autocast=s.autocast,
        )  # fmt: skip
        if figures["queries"] and figures["mAP"] > best.get("mAP", -1.0):
            best, chosen = figures | ({"network": name} if len(networks) > 1 else {}), network
    return best, chosen


def _look_at(s: Session, labels: np.ndarray, epoch: int) -> dict[str, Any]:
    """Health of this epoch's labels; refuses those that nothing can be learned from."""
    config = s.recipe.config
    pids = np.array([sample.pid for sample in s.dataset.train]) if s.dataset.has_pids else None
    health = label_health(labels, s.labels, pids)
    if health["clusters"] == 0:
        raise NoClustersError(
            f"epoch {epoch}: all {len(labels)} images are un-clustered at {s.recipe.labels.settings(epoch)}. "
            f"{s.recipe.labels.advice.no_cluster}, in another run"
            + ("" if epoch == 0 else "; the finished epochs of this one are saved")
        )
    if health["clusters"] == 1:
        s.display.line(
            f"warning: epoch {epoch}: one cluster holds all clustered images, so its labels tell nobody apart. "
            f"{s.recipe.labels.advice.one_cluster} (now {s.recipe.labels.settings(epoch)})"
            + (" or try center_per_camera=True" if s.dataset.has_cameras and not config.center_per_camera else "")
        )
    return health


def _record(s: Session, record: dict[str, Any]) -> None:
    s.records.append(record)
    try:
        with open_own(s.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise checkpoint.SaveError(f"cannot write {s.folder / 'metrics.jsonl'}: {error}") from error


def _keep(s: Session, record: dict[str, Any], network: nn.Module) -> None:
    """Save a finished epoch, ``network`` as its model.

    ``state`` goes last: an epoch counts as finished once all else of it is on disk.
    """
    best = max((r["mAP"] for r in s.records if r["epoch"] >= 0 and r.get("mAP") is not None), default=-1.0)
    about = {
        "method": s.recipe.name,
        "dataset": s.dataset.name,
        "epoch": record["epoch"],
        "mAP": record.get("mAP"),
        "config": s.recipe.config.to_dict(),
    }
    _record(s, record)
    checkpoint.save_model(s.folder, "model_last", network, about)
    if record.get("mAP") is not None and record["mAP"] > best:
        checkpoint.save_model(s.folder, "model_best", network, about)
    checkpoint.save_state(
        s.folder,
        s.recipe,
        s.optimizer,
        {"labels": torch.from_numpy(s.labels), "readable": s.recipe.images.readable},
        {"epoch": record["epoch"], "data": s.data},
    )
    people = len({x.pid for x in s.dataset.train if x.pid >= 0}) if s.dataset.has_pids else None
    draw_curves(s.records, s.folder / "curves.png", f"{s.recipe.paper.title} on {s.dataset.name}", people)
    s.display.line(table_row(record))


def _reseed(s: Session, epoch: int) -> None:
    """What draws from torch's own generators, as stochastic depth does, depends on seed and epoch alone."""
    seed = s.recipe.config.seed + 1_000_003 * epoch
    torch.default_generator.manual_seed(seed)
    if s.device.type == "cuda":
        with torch.cuda.device(s.device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)

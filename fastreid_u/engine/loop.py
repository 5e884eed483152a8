# SPDX-License-Identifier: Apache-2.0
"""The algorithm: extract, label, fit, evaluate, again. ``run_epochs`` reads as the papers' pseudo-code does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastreid_u._checks import require_ids, require_same_length
from fastreid_u._label_checks import require_clustering
from fastreid_u.engine.card import table_head, table_row
from fastreid_u.engine.curves import draw_curves
from fastreid_u.engine.evaluate import rank_split
from fastreid_u.engine.fit import fit_epoch
from fastreid_u.engine.health import label_health
from fastreid_u.engine.labels_file import write_labels
from fastreid_u.engine.optimizer import learning_rate
from fastreid_u.engine.pace import Pace, evaluation_due
from fastreid_u.engine.records import highest_map
from fastreid_u.engine.session import Session, current_state
from fastreid_u.engine.watch import LabelWatch


class NoClustersError(RuntimeError):
    """Every image is un-clustered: there is nothing to train on."""


def run_epochs(session: Session) -> None:
    """Train from ``session.start`` to the last epoch, saving after each."""
    s, config, display = session, session.recipe.config, session.machine.display
    s.pace = Pace(config)
    s.watch = LabelWatch(
        len(s.target.samples),
        s.recipe.labels,
        uncentred=s.datasets.target.has_train_cameras and not config.center_per_camera,
        before=s.folder.records,
    )
    if not s.folder.records:
        _before_training(s)
    display.line(table_head())
    for record in s.folder.records:
        display.line(table_row(record))
    if s.start > 0:  # a run that was killed may have a state without its picture
        draw(s)

    for epoch in range(s.start, config.epochs):
        seconds: dict[str, float] = {}
        _reseed(s, epoch)
        with _timed(seconds, "extract"):
            features = s.recipe.features(s.extract, epoch)
            s.kept.forget()
        with _timed(seconds, "label"), display.phase("label", len(features)) as advance:
            found, whose = s.recipe.labels(features, epoch), f"labels of {s.recipe.name!r}"
            labels = require_clustering("train", whose, found, len(features)).to(features.device)
            advance(len(features))
        health = check_labels(s, labels.cpu().numpy(), epoch)

        with _timed(seconds, "fit"):
            targets = s.recipe.begin_epoch(features, labels, epoch)
            if not isinstance(targets, torch.Tensor):
                raise TypeError(f"train: begin_epoch of {s.recipe.name!r} must return (N,) targets, got {targets!r}")
            targets = require_ids("train", f"targets of begin_epoch of {s.recipe.name!r}", targets)
            require_same_length("train", f"targets of begin_epoch of {s.recipe.name!r}", targets, "features", features)
            loss = fit_epoch(s, epoch, targets)
        with _timed(seconds, "evaluate"):
            due = evaluation_due(config, epoch)
            ranking, network = _ranking(s) if due else ({}, next(iter(s.recipe.ranked().values())))

        s.labels = labels.cpu().numpy()
        lr = learning_rate(config, epoch)
        record = {"epoch": epoch, **health, "loss": loss, "lr": lr, **ranking, "seconds": seconds}
        save_epoch(s, record, network)
        display.line(table_row(record))
        s.pace.measured({name: took for name, took in seconds.items() if due or name != "evaluate"})
        if epoch == s.start and (left := s.pace.line(epoch)):
            display.line(left)


def _before_training(s: Session) -> None:
    """Evaluate the network before the first epoch, where that is wanted; a run of no epochs is saved with it."""
    config, seconds = s.recipe.config, {}
    if config.epochs == 0:
        ranking, network = _ranking(s)
        save_epoch(s, {"epoch": -1, **ranking}, network)
    elif config.eval_initial and s.test:
        with _timed(seconds, "evaluate"):
            s.folder.add_record({"epoch": -1, **_ranking(s)[0]})
        s.pace.measured(seconds)


def _ranking(s: Session) -> tuple[dict[str, Any], nn.Module]:
    """Figures of the best of the recipe's networks on the images to rank, and that network.

    The figures are empty if there is nothing to rank, or no query has a match, which ``rank_metrics`` has then warned
    of; the network is then the recipe's first.
    """
    networks = s.recipe.ranked()
    found: list[dict[str, Any]] = []
    for name, network in networks.items() if s.test else ():
        features = s.test.features(network, "evaluate")
        figures = rank_split(features, s.test.split, s.recipe.config.ap)
        if s.ranks_training_images:
            s.kept.keep(network, features)
        if figures["queries"]:
            found.append(figures | {"network": name, "ranked": s.surroundings["ranked"][:12]})
    best = highest_map(found)
    if best is None:
        return {}, next(iter(networks.values()))
    network = networks[best["network"]]
    if len(networks) == 1:
        del best["network"]
    return best, network


def check_labels(s: Session, labels: np.ndarray, epoch: int) -> dict[str, Any]:
    """Health of this epoch's labels; warns where training cannot learn from them.

    Raises:
        NoClustersError: there is no cluster to learn from.
    """
    recipe, target = s.recipe, s.datasets.target
    pids = np.array([sample.pid for sample in target.train]) if target.has_pids else None
    health = label_health(labels, s.labels, pids)
    if health["clusters"] == 0:
        raise NoClustersError(
            f"epoch {epoch}: all {len(labels)} images are un-clustered at {recipe.labels.settings(epoch)}. "
            f"{recipe.labels.advice.no_cluster}, in another run"
            + ("" if epoch == 0 else "; the finished epochs of this one are saved")
        )
    for line in s.watch.look({"epoch": epoch, **health}):
        s.machine.display.line(line)
    return health


def save_epoch(s: Session, record: dict[str, Any], network: nn.Module) -> None:
    """Save a finished epoch, with ``network`` as its model; epoch -1 is the network before training."""
    recipe, target = s.recipe, s.datasets.target
    about = {
        "method": recipe.name,
        "dataset": target.name,
        "epoch": record["epoch"],
        "mAP": record.get("mAP"),
        "config": recipe.config.to_dict(),
    }
    if s.labels is not None:
        write_labels(s.folder.labels, target.train, s.labels)
    s.folder.save_epoch(record, network, about, current_state(s, record["epoch"]))
    draw(s)


def draw(s: Session) -> None:
    """The picture of the epochs so far."""
    target = s.datasets.target
    people = len({sample.pid for sample in target.train if sample.pid >= 0}) if target.has_pids else None
    place = {"ranked_on": s.test.split.place} if s.test else {}
    title = f"{s.recipe.paper.title} on {target.name}"
    draw_curves(s.folder.records, s.folder.curves, title, true_clusters=people, **place)


def _reseed(s: Session, epoch: int) -> None:
    """What draws from torch's own generators, as stochastic depth does, depends on seed and epoch alone."""
    seed = s.recipe.config.seed + 1_000_003 * epoch
    torch.default_generator.manual_seed(seed)
    if s.machine.device.type == "cuda":
        with torch.cuda.device(s.machine.device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)

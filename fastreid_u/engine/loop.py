# SPDX-License-Identifier: Apache-2.0
"""The algorithm: extract, label, fit, evaluate, again. ``run_epochs`` reads as the papers' pseudo-code does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastreid_u.engine.card import table_head, table_row
from fastreid_u.engine.curves import draw_curves
from fastreid_u.engine.evaluate import evaluate_split
from fastreid_u.engine.fit import fit_epoch
from fastreid_u.engine.health import label_health
from fastreid_u.engine.optimizer import learning_rate
from fastreid_u.engine.records import highest_map
from fastreid_u.engine.session import Session, current_state


class NoClustersError(RuntimeError):
    """Every image is un-clustered: there is nothing to train on."""


def run_epochs(session: Session) -> None:
    """Train from ``session.start`` to the last epoch, saving after each."""
    s, config, display = session, session.recipe.config, session.machine.display
    if s.start == 0 and config.eval_initial and s.test:
        s.folder.add_record({"epoch": -1, **_ranking(s)[0]})
    display.line(table_head())
    for record in s.folder.records:
        display.line(table_row(record))

    for epoch in range(s.start, config.epochs):
        seconds: dict[str, float] = {}
        _reseed(s, epoch)
        with _timed(seconds, "extract"):
            features = s.recipe.features(s.extract, epoch)
        with _timed(seconds, "label"), display.phase("label", len(features)) as advance:
            labels = s.recipe.labels(features, epoch)
            advance(len(features))
        health = check_labels(s, labels.cpu().numpy(), epoch)

        with _timed(seconds, "fit"):
            targets = s.recipe.begin_epoch(features, labels, epoch)
            if not isinstance(targets, torch.Tensor):
                raise TypeError(f"train: begin_epoch of {s.recipe.name!r} must return (N,) targets, got {targets!r}")
            loss = fit_epoch(s, epoch, targets)
        with _timed(seconds, "evaluate"):
            due = (epoch + 1) % config.eval_step == 0 or epoch == config.epochs - 1
            ranking, network = _ranking(s) if due else ({}, next(iter(s.recipe.ranked().values())))

        s.labels = labels.cpu().numpy()
        lr = learning_rate(config, epoch)
        save_epoch(s, {"epoch": epoch, **health, "loss": loss, "lr": lr, **ranking, "seconds": seconds}, network)


def _ranking(s: Session) -> tuple[dict[str, Any], nn.Module]:
    """Figures of the best of the recipe's networks on the images to rank, and that network.

    The figures are empty if there is nothing to rank, or no query has a match, which ``rank_metrics`` has then warned
    of; the network is then the recipe's first.
    """
    networks = s.recipe.ranked()
    found: list[dict[str, Any]] = []
    for name, network in networks.items() if s.test else ():
        figures = evaluate_split(network, s.test, s.recipe.config.ap)
        if figures["queries"]:
            found.append(figures | {"network": name})
    best = highest_map(found)
    if best is None:
        return {}, next(iter(networks.values()))
    network = networks[best["network"]]
    if len(networks) == 1:
        del best["network"]
    return best, network


def check_labels(s: Session, labels: np.ndarray, epoch: int) -> dict[str, Any]:
    """Health of this epoch's labels; warns of a single cluster.

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
    if health["clusters"] == 1:
        centring = target.has_train_cameras and not recipe.config.center_per_camera
        s.machine.display.line(
            f"warning: epoch {epoch}: one cluster holds all clustered images, so its labels tell nobody apart. "
            f"{recipe.labels.advice.one_cluster} (now {recipe.labels.settings(epoch)})"
            + (" or try center_per_camera=True" if centring else "")
        )
    return health


def save_epoch(s: Session, record: dict[str, Any], network: nn.Module) -> None:
    """Save a finished epoch, ``network`` as its model, and show it."""
    recipe, target = s.recipe, s.datasets.target
    about = {
        "method": recipe.name,
        "dataset": target.name,
        "epoch": record["epoch"],
        "mAP": record.get("mAP"),
        "config": recipe.config.to_dict(),
    }
    s.folder.save_epoch(record, network, about, current_state(s, record["epoch"]))
    people = len({sample.pid for sample in target.train if sample.pid >= 0}) if target.has_pids else None
    place = {"ranked_on": s.test.split.place} if s.test else {}
    title = f"{recipe.paper.title} on {target.name}"
    draw_curves(s.folder.records, s.folder.curves, title, true_clusters=people, **place)
    s.machine.display.line(table_row(record))


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

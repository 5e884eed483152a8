# SPDX-License-Identifier: Apache-2.0
"""One training in progress: what it works with, how that is set up, and what is saved and restored of it."""

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fastreid_u.config import Config
from fastreid_u.engine.allocator import keeping_freed_memory
from fastreid_u.engine.datasets import Datasets
from fastreid_u.engine.device import Machine
from fastreid_u.engine.evaluate import SplitImages, test_split
from fastreid_u.engine.finite import not_finite, require_finite, wrong_weight
from fastreid_u.engine.folder import RunFolder
from fastreid_u.engine.image_set import ImageSet, Reading
from fastreid_u.engine.optimizer import make_optimizer
from fastreid_u.engine.pace import Pace
from fastreid_u.engine.restored import load_tensors
from fastreid_u.engine.reuse import KeptFeatures
from fastreid_u.engine.same_run import compared, compared_best, compared_settings
from fastreid_u.engine.speed import feature_batch
from fastreid_u.engine.state import State
from fastreid_u.engine.surroundings import surroundings
from fastreid_u.engine.watch import LabelWatch
from fastreid_u.recipe import Recipe

if TYPE_CHECKING:
    from fastreid_u.models import ReIDModel

_CALIBRATION_BATCH = 256  # images, where the batch of an extraction is left to the machine


@dataclass
class Session:
    """One run in progress: what it uses, and what it has reached.

    Attributes:
        recipe: the method; it holds the networks from ``start_networks`` on.
        datasets: the data sets, with names, identities and cameras.
        target: the images to learn.
        source: the images of the labelled set, where the method learns from one.
        test: the images to evaluate on; None where nothing can be ranked.
        machine: device, precision and display.
        folder: where the run is saved, with its records so far.
        optimizer: made by ``start_networks``.
        start: the first epoch that is still to be trained.
        labels: (N,) labels of the last finished epoch, or None before it.
        watch: what warns of poor labels, and ``pace`` what estimates the time; made by ``run_epochs``.
        kept: features of an evaluation, for the extraction after it.
        surroundings: what a run that goes on should find again (surroundings.py).
        never_finite: names of the recipe's tensors that held NaN or infinity from the start, as masks do.
    """

    recipe: Recipe
    datasets: Datasets
    target: ImageSet
    source: ImageSet | None
    test: SplitImages | None
    machine: Machine
    folder: RunFolder
    optimizer: torch.optim.Optimizer | None = None
    start: int = 0
    labels: np.ndarray | None = None
    watch: LabelWatch | None = None
    pace: Pace | None = None
    kept: KeptFeatures = field(default_factory=KeptFeatures)
    surroundings: dict[str, str] = field(default_factory=dict)
    never_finite: frozenset[str] = frozenset()

    @property
    def ranks_training_images(self) -> bool:
        """Whether the images to evaluate on are all training images, in their order."""
        return self.test is not None and self.test.samples == self.target.samples

    def extract(self, network: nn.Module, *, of: str = "target") -> Tensor:
        """``recipe.Extract``: features of all "target" or all "source" images, unaugmented.

        Which of them could be read is from then on in ``recipe.images``. Those of an evaluation that has just looked at
        the same images through the same network are not computed again.
        """
        images, about = self.target, self.recipe.images
        if of == "source":
            images, about = self.source, about.source
        features = self.kept.take(network) if of == "target" else None
        if features is None:
            features = images.features(network)
        about.readable = torch.isfinite(features).all(dim=1).cpu()
        return features

    def close(self) -> None:
        """End the worker processes, which would last as long as an exception that refers to this session."""
        for images in (self.target, self.source, self.test):
            if images is not None:
                images.close()


def build_network(config: Config, device: torch.device, *, trained: bool) -> "ReIDModel":
    """The network of a new run, or of one that is resumed.

    With ``trained`` its weights will come from the run, and the file that it began with may be gone.

    Raises:
        ValueError: the file of weights holds NaN or infinity. As ``build_model``.
    """
    from fastreid_u.models import build_model

    model = build_model(
        config.arch, pooling=config.pooling_type, weights=None if trained else config.weights, bn_group=config.bn_group,
        bn_running=config.bn_running, stem_relu=config.stem_relu, drop_path=config.drop_path,
        image_size=(config.height, config.width), seed=config.seed,
    )  # fmt: skip
    if wrong := wrong_weight(model):
        raise ValueError(f"train: weights must be finite, got NaN or infinity in {wrong} of {config.weights}")
    if trained:
        model.card["weights"] = f"{config.weights or 'random'}, as trained so far"
    return model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)


def open_session(recipe: Recipe, datasets: Datasets, machine: Machine, folder: RunFolder) -> Session:
    """Make the sets of images that the epochs work with. Close the session when done."""
    from fastreid_u.data import test_transform

    config, target, source = recipe.config, datasets.target, datasets.source
    if config.center_per_camera and not target.has_train_cameras:
        machine.display.line(
            "warning: center_per_camera has no effect: the training images have no camera ids, or one camera only"
        )
    reading = Reading(
        test_transform(config.height, config.width, pixel_norm=config.pixel_norm),
        feature_batch(config.eval_batch_size, machine.device, config.height, config.width),
        train_views=recipe.views(),
        train_batch_size=config.batch_size,
        workers=config.workers,
        worker_start=config.worker_start,
        truncated=config.truncated_images,
        seed=config.seed,
        cache=config.cache_images,
    )
    split = test_split(target, machine.display, ignore_cameras=config.ignore_cameras)
    return Session(
        recipe=recipe,
        datasets=datasets,
        target=ImageSet(target.train, reading, machine),
        source=ImageSet(source.train, reading, machine) if source else None,
        test=SplitImages(split, replace(reading, train_views=None), machine) if split else None,
        machine=machine,
        folder=folder,
        surroundings=surroundings(datasets, split, machine.device),
    )


def start_networks(session: Session, model: "ReIDModel", *, calibrate: bool) -> None:
    """Hand ``model`` to the recipe and make the optimiser of what comes out.

    BatchNorm is calibrated first, so that the copies which a recipe makes of the network have its statistics too.
    """
    recipe, machine = session.recipe, session.machine
    config = recipe.config
    if calibrate and config.calibrate_bn:
        from fastreid_u.data import chunks
        from fastreid_u.models import calibrate_batchnorm

        # Any fixed spread over the images will do; batches of near-identical neighbours would not.
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(session.target.samples), generator=generator).tolist()
        spread = session.target.plain_batches(chunks(order, config.eval_batch_size or _CALIBRATION_BATCH))
        batches = (loaded.images.to(machine.device) for loaded in spread)
        with keeping_freed_memory(machine.device), machine.precision(steps=True):
            calibrate_batchnorm(model, islice(batches, config.calibrate_bn))
    recipe.build(model)
    recipe.to(machine.device)
    state = recipe.state_dict()
    session.never_finite = frozenset(f"recipe.{name}" for name in state if not_finite({name: state[name]}))
    session.optimizer = make_optimizer([weight for weight in recipe.parameters() if weight.requires_grad], config)


def current_state(session: Session, epoch: int) -> State:
    """All that the run needs to go on after ``epoch``; -1, before the first, has all images un-clustered.

    Raises:
        FloatingPointError: a weight, a memory or a moment is NaN or infinite, so that nothing could go on from it.
    """
    recipe, labels = session.recipe, session.labels
    if labels is None:
        labels = np.full(len(session.target.samples), -1)
    tensors = {f"recipe.{name}": tensor for name, tensor in recipe.state_dict().items()}
    tensors |= {"labels": torch.from_numpy(labels), "readable": recipe.images.readable}
    for index, moments in session.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    require_finite(tensors, epoch, but=session.never_finite)
    return State(epoch, session.datasets.fingerprint, tensors, surroundings=session.surroundings)


def restore(session: Session) -> None:
    """Bring ``session`` to the end of its folder's last finished epoch; records of later epochs are dropped.

    Raises:
        LayoutError: another version wrote the state.
        ValueError: the training images or the settings are not the run's own, or the state is not of such a run.
    """
    folder, line = session.folder, session.machine.display.line
    state = folder.state()
    count, expected = len(session.target.samples), state.tensors["labels"].numel()
    if expected != count or state.fingerprint != session.datasets.fingerprint:
        raise ValueError(
            f"train: the data must be the run's own, got others in {session.datasets.target.root}: {count} training "
            f"images, the run has {expected}"
            + (", with other names, sizes, identities or cameras" if expected == count else "")
        )
    for note in compared(session.surroundings, state, session.datasets.target.root):
        line(note)
    for note in compared_settings(folder, session.recipe, state):
        line(note)
    load_tensors(session.recipe, session.optimizer, state, folder.state_file)
    session.labels = state.tensors["labels"].numpy() if state.epoch >= 0 else None  # there were none before epoch 0
    session.start = state.epoch + 1
    if folder.go_on_after(state.epoch, state.records):
        line(f"note: {folder.metrics} had lost records, or held others; those until epoch {state.epoch} are back")
    for note in compared_best(folder, state.epoch):
        line(note)
    line(f"resumed {f'after epoch {state.epoch}' if session.start else 'before epoch 0'}")

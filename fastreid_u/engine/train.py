# SPDX-License-Identifier: Apache-2.0
"""``train``: everything that surrounds the epochs. Checks first, work after; the algorithm itself is in ``loop.py``."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u._default_device import on_cpu
from fastreid_u.config import Config
from fastreid_u.engine.arguments import Arguments, Experiment, experiment_of
from fastreid_u.engine.card import RecipeCard, metric_block, model_selection, outcome
from fastreid_u.engine.datasets import load_datasets
from fastreid_u.engine.device import pick_device
from fastreid_u.engine.display import Display
from fastreid_u.engine.folder import RunFolder, settings_text
from fastreid_u.engine.loop import run_epochs
from fastreid_u.engine.network_settings import pixel_warning
from fastreid_u.engine.records import Records
from fastreid_u.engine.session import Session, build_network, open_session, restore, start_networks
from fastreid_u.engine.speed import fitted_to_machine, machine_for, speed_line
from fastreid_u.ranks import require_one_rank
from fastreid_u.recipe import Recipe

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset
    from fastreid_u.models import ReIDModel


@dataclass(frozen=True)
class Run:
    """What ``train`` returns.

    Attributes:
        folder: where the run lies.
        config: its settings.
        records: one dict per epoch, as in ``metrics.jsonl`` (epoch -1 = before training, if evaluated).
        model: the network after the last epoch, in eval mode.
    """

    folder: Path
    config: Config
    records: Records
    model: torch.nn.Module

    @property
    def last(self) -> dict[str, Any]:
        """Record of the last epoch; of the network before training for ``epochs=0``."""
        return self.records.last

    @property
    def best(self) -> dict[str, Any] | None:
        """Record of the epoch with the highest mAP, the one in ``model_best``; None if nothing was evaluated."""
        return self.records.best


def train(
    dataset: "str | os.PathLike | ReIDDataset | None" = None,
    *,
    method: str | type[Recipe] | None = None,
    root: str | os.PathLike | None = None,
    logs_dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    quiet: bool = False,
    data: Mapping[str, Any] | None = None,
    source_data: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Run:
    """Learn a Re-ID feature from images without identity labels.

    Args:
        dataset: a known name (``fastreid_u.data.dataset_names()``), a folder of crops, a CSV of ``path,pid,camid``, or
            a ready ``ReIDDataset``. Identities, where known, are used to report ARI, NMI and mAP, never to train. May
            be left out with ``resume``, unless it was a ready one.
        method: a name from ``fastreid_u.methods()`` or a ``Recipe`` subclass; default "cluster_contrast", with
            ``resume`` the run's own.
        root: where data sets lie; default ``$FASTREID_U_DATA``, else ``./data``.
        logs_dir: the run folder; default ``runs/<dataset>-<method>``, numbered if taken.
        resume: go on with the run in ``logs_dir`` after its last finished epoch. On a CPU the result equals that of
            an unbroken run on the same machine.
        overwrite: replace the run in ``logs_dir``.
        device: default a GPU if there is one, else the CPU.
        quiet: print nothing; ``log.txt`` is written all the same. Python's warnings stay warnings, each once.
        data: options of the data set's reader, such as the dials of ``synthetic``.
        source_data: the same for the labelled set that a method's ``source`` names.
        **overrides: any field of the method's config, such as ``eps=0.5``.

    Returns:
        A ``Run``: folder, config, one record per epoch, and the network.

    Raises:
        ValueError, TypeError: unknown method, data set or option, or a value out of range; nothing has been touched.
        RuntimeError: torch.distributed is initialised with several ranks, which a run cannot use yet.
        LayoutError: the run to resume was written by a version that keeps runs in another form.
        FileNotFoundError: the data are not where they were looked for; the message names the places.
        FileExistsError: ``logs_dir`` holds a run and neither ``resume`` nor ``overwrite`` is given.
        NoClustersError: an epoch's labels hold no cluster. TooManyBadImages: more than 5 % of a split is unreadable.
        FloatingPointError: the network diverged. SaveError: the disk is full, say. All four keep finished epochs.
    """
    require_one_rank("train")
    device = pick_device("train", device)
    arguments = Arguments(dataset, method, root, data, source_data, overrides)
    folder = None if logs_dir is None else RunFolder(logs_dir)
    stored = _stored_settings(folder, overwrite=overwrite) if resume else None
    experiment = experiment_of(arguments, stored)
    experiment = replace(experiment, config=fitted_to_machine(experiment.config, device))
    if folder is not None:
        folder.refuse_taken(overwrite=overwrite or resume)

    with _undisturbed(device), ExitStack() as stack:
        display = Display(quiet=quiet)
        datasets = load_datasets(experiment, display)
        recipe = experiment.recipe_class(experiment.config, datasets.images())
        model = build_network(experiment.config, device, trained=resume)
        machine = machine_for(experiment.config, device, model, display)

        free_name = f"{datasets.target.name}-{recipe.name}"
        folder = stack.enter_context(RunFolder.locked_free(free_name) if folder is None else folder.locked())
        folder.refuse_taken(overwrite=overwrite or resume)  # a run may have begun here before the lock was ours
        session = stack.enter_context(closing(open_session(recipe, datasets, machine, folder)))
        settings = settings_text(experiment.settings(datasets.target, datasets.source, device))

        folder.clean(run=overwrite)  # an older run lasts until here, where nothing more can be refused
        display.log_to(folder.log)
        if not resume:
            folder.begin(settings)
        _introduce(session, model, experiment)
        with display.hearing_warnings():
            start_networks(session, model, calibrate=not resume)
            if resume:
                restore(session)
                folder.write_settings(settings)  # it may have been given more epochs
            run_epochs(session)
        return _finish(session)


def _stored_settings(folder: RunFolder | None, *, overwrite: bool) -> dict[str, dict[str, Any]]:
    """Settings of the run to resume."""
    if folder is None:
        raise ValueError("train: logs_dir must name the run to resume, got None")
    if overwrite:
        raise ValueError("train: resume and overwrite must not both be true, got True and True")
    folder.require_finished_epoch()
    return folder.settings("train")


def _introduce(session: Session, model: "ReIDModel", experiment: Experiment) -> None:
    """Show tables of the data, and the recipe card."""
    display, recipe, datasets = session.machine.display, session.recipe, session.datasets
    for line in datasets.target.table().splitlines():
        display.line(line)
    for note in datasets.target.notes:
        display.line(f"note: {note}")
    if datasets.source is not None:
        display.line(f"learns also from the labelled training images of {datasets.source.name}:")
        for line in datasets.source.table().splitlines():
            display.line(line)
        for note in datasets.source.notes:
            display.line(f"note: {note}")
    display.line()
    selects = model_selection(recipe, session.test.split if session.test else None)
    name, device = experiment.name or datasets.target.name, str(session.machine.device)
    labels = recipe.labels
    speed = speed_line(recipe.config, session.machine)
    card = RecipeCard(
        type(recipe), recipe.config, name, model.describe(), labels.describe(), device, selects, labels.scale(), speed
    )
    unlike = pixel_warning(recipe.config)
    for line in [*card.lines(), f"  run folder  {session.folder}", *([unlike] if unlike else []), ""]:
        display.line(line)


def _finish(session: Session) -> Run:
    """Show the last epoch's figures, and hand over the run."""
    display, folder, recipe = session.machine.display, session.folder, session.recipe
    run = Run(folder.path, recipe.config, folder.records, next(iter(recipe.ranked().values())).eval())
    if run.last.get("mAP") is not None:
        display.line()
        for line in metric_block(run.last):
            display.line(line)
        for line in outcome(run.records, session.test.split.place):
            display.line(line)
    files = ", ".join(file.name for file in (folder.model_file("last"), folder.curves, folder.metrics, folder.log))
    display.line(f"run folder: {folder}  ({files})")
    return run


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the run from torch's global settings (dtype, device, inference mode, random state), and these from it."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    devices = [device] if device.type == "cuda" else []
    try:
        with on_cpu(), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_default_dtype(dtype)

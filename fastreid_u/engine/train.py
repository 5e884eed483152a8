# SPDX-License-Identifier: Apache-2.0
"""``train``: everything that surrounds the epochs. Checks first, work after; the algorithm itself is in ``loop.py``."""

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u.config import Config, dump_toml
from fastreid_u.engine import checkpoint
from fastreid_u.engine.claim import FolderInUse, claimed
from fastreid_u.engine.device import pick_device
from fastreid_u.engine.display import Display
from fastreid_u.engine.loop import Session, run_epochs, start_networks
from fastreid_u.engine.opening import SOURCE_DIALS, build_network, images_of, load, load_source, located, open_session
from fastreid_u.engine.report import metric_block, recipe_card
from fastreid_u.engine.resume import place, restore, stored_config, stored_method, stored_tables
from fastreid_u.methods import get_method
from fastreid_u.recipe import Recipe

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset
    from fastreid_u.models import ReIDModel


@dataclasses.dataclass(frozen=True)
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
    records: list[dict[str, Any]]
    model: torch.nn.Module

    @property
    def last(self) -> dict[str, Any]:
        """Record of the last epoch."""
        return self.records[-1]

    @property
    def best(self) -> dict[str, Any] | None:
        """Record of the epoch with the highest mAP, the one in ``model_best``; None if nothing was evaluated."""
        ranked = [r for r in self.records if r["epoch"] >= 0 and r.get("mAP") is not None]
        return max(ranked, key=lambda r: r["mAP"], default=None)


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
        FileNotFoundError: the data are not where they were looked for; the message says where that was.
        FileExistsError: ``logs_dir`` holds a run and neither ``resume`` nor ``overwrite`` is given.
        NoClustersError: an epoch's labels hold no cluster. TooManyBadImages: more than 5 % of a split is unreadable.
        FloatingPointError: the network diverged. SaveError: the disk is full, say. All four keep finished epochs.
    """
    from fastreid_u.data import ReIDDataset, known_name

    device = pick_device("train", device)
    folder = None if logs_dir is None else Path(logs_dir).expanduser()
    for argument, options in (("data", data), ("source_data", source_data)):
        if not isinstance(options, Mapping | None):
            raise TypeError(f"train: {argument} must map a reader's options to values, got {options!r}")
    stored: dict[str, dict[str, Any]] | None = None
    if resume:
        if folder is None:
            raise ValueError("train: logs_dir must name the run to resume, got None")
        checkpoint.require_resumable(folder, overwrite=overwrite)
        stored = stored_tables("train", folder)
        if dataset is None and not stored["run"]["dataset"]:
            raise ValueError("train: dataset must be given again for a run that was given a ready one, got None")
        dataset = stored["run"]["dataset"] if dataset is None else dataset
        method = stored_method(stored) if method is None else method
        data = stored["data"] if data is None else data
        source_data = stored["source_data"] if source_data is None else source_data

    recipe_class = get_method("cluster_contrast" if method is None else method)
    given = isinstance(dataset, ReIDDataset)
    if given and data and not resume:
        raise ValueError(f"train: data must be left out with a ready dataset, got {dict(data)}")
    name = "" if given else located("dataset", dataset, root)
    if overrides.get("source") is not None:
        overrides["source"] = located("source", overrides["source"], root)
    if stored:
        config = stored_config(stored, recipe_class, overrides)
    else:
        config = recipe_class.Config.for_dataset(dataset.name if given else name, **overrides)
        if folder is not None:
            checkpoint.refuse_taken(folder, overwrite=overwrite)

    places = {"root": root, "source_root": root}
    if stored and root is None:
        places["root"] = place(name, stored["run"]["root"])
        places["source_root"] = place(getattr(config, "source", None) or "", stored["run"].get("source_root"))
    with _undisturbed(device), ExitStack() as stack:
        reid = dataset if given else load(dataset, places["root"], data, Display(quiet=quiet))
        if not reid.train:
            raise ValueError(f"train: dataset must hold training images, got none in {reid.root}")
        if getattr(config, "source", None) is not None:
            source_data = {**SOURCE_DIALS.get(known_name(config.source), {}), **dict(source_data or {})}
        labelled = load_source(recipe_class, config, places["source_root"], source_data, display=Display(quiet=quiet))
        if labelled is not None and not {s.path for s in reid.train}.isdisjoint(s.path for s in labelled.train):
            raise ValueError(f"train: source must hold other images than the set to learn, got {reid.root} for both")
        recipe = recipe_class(config, images_of(reid, labelled))
        model = build_network(config, device, trained=resume)

        if folder is None:
            folder = _claim_free_folder(stack, f"{reid.name}-{recipe_class.name}")
        else:
            checkpoint.make_folder(folder)
            stack.enter_context(claimed(folder))
            checkpoint.refuse_taken(folder, overwrite=overwrite or resume)  # again, now that nobody else can make one
        early = folder / ".log.early"  # an older run's log must last until nothing more can be refused
        early.unlink(missing_ok=True)
        stack.callback(early.unlink, missing_ok=True)
        display = Display(folder / "log.txt" if resume else early, quiet=quiet)
        session = open_session(recipe, reid, labelled, device, display, folder)
        stack.callback(session.close)
        run = dict(stored["run"]) if stored else {
            "method": recipe_class.name, "dataset": name, "fastreid_u": _version(), "torch": torch.__version__,
            "device": str(device), "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        run |= {"root": os.path.abspath(reid.root), "source_root": labelled and os.path.abspath(labelled.root)}
        options = {"data": dict(data or {}), "source_data": dict(source_data or {})}
        told = dump_toml({"run": run, "config": config.to_dict(), **options})
        checkpoint.sweep(folder, run=overwrite)
        if early.exists():
            early.replace(folder / "log.txt")
        display.log = folder / "log.txt"
        if not resume:
            checkpoint.write_text(folder / "config.toml", told)

        _introduce(session, model, labelled, reid.name if given else name)
        with display.hearing_warnings():
            start_networks(session, model, calibrate=not resume)
            if resume:
                restore(session)
                checkpoint.write_text(folder / "config.toml", told)  # it may have been given more epochs
            run_epochs(session)
        return _finished(session)


def _introduce(session: Session, model: "ReIDModel", labelled: "ReIDDataset | None", key: str) -> None:
    """Tables of the data, and the recipe card."""
    display, reid, recipe = session.display, session.dataset, session.recipe
    for line in reid.table().splitlines():
        display.line(line)
    for note in reid.notes:
        display.line(f"note: {note}")
    if labelled is not None:
        display.line(f"learns also from the labelled training images of {labelled.name}:")
        for line in labelled.table().splitlines():
            display.line(line)
    display.line()
    about = {
        "model": model.describe(),
        "labels": recipe.labels.describe(),
        "device": str(session.device),
        "selects": _selects(session),
    }
    for line in [*recipe_card(type(recipe), recipe.config, key, **about), f"  run folder  {session.folder}", ""]:
        display.line(line)


def _finished(session: Session) -> Run:
    display, folder = session.display, session.folder
    run = Run(folder, session.recipe.config, session.records, next(iter(session.recipe.ranked().values())).eval())
    if run.last.get("mAP") is not None:
        display.line()
        for line in metric_block(run.last):
            display.line(line)
        best = f"best mAP {run.best['mAP']:.1%} at epoch {run.best['epoch']}, on the {_ranked_on(session)}"
        display.line(f"last epoch {run.last['epoch']}; {best}")
    display.line(f"run folder: {folder}  (model_last.safetensors, curves.png, metrics.jsonl, log.txt)")
    return run


def _ranked_on(session: Session) -> str:
    return "test split" if session.split.queries is not None else "training images themselves"


def _selects(session: Session) -> str:
    """What model_best is, for the card."""
    if session.split is None:
        return "nothing to evaluate on, so no model_best"
    text = f"model_best is chosen on the {_ranked_on(session)}"
    paper = session.recipe.paper
    if session.split.queries is None or not paper.published:
        return text
    return f"{text}, as published" if paper.model == "best" else f"{text}; published: the last epoch"


def _claim_free_folder(stack: ExitStack, name: str) -> Path:
    """The first of ``name``, ``name-2``, ... under ./runs that holds no run and that nobody else is about to fill."""
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if checkpoint.holds_run(folder):
            continue
        checkpoint.make_folder(folder)
        with suppress(FolderInUse):
            stack.enter_context(claimed(folder))
            if not checkpoint.holds_run(folder):
                return folder
    raise AssertionError("there is always a next number")


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """What a caller may have set for torch as a whole neither reaches the run nor is changed by it."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _version() -> str:
    try:
        return version("fastreid-u")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"

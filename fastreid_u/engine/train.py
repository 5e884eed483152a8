# SPDX-License-Identifier: Apache-2.0
"""``train``: everything that surrounds the epochs. Checks first, work after; the algorithm itself is in ``loop.py``."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u.config import Config, dump_toml, load_toml
from fastreid_u.engine import checkpoint
from fastreid_u.engine.display import Display, Phase
from fastreid_u.engine.evaluate import test_split
from fastreid_u.engine.extract import BadImageLog
from fastreid_u.engine.loop import Session, SourceLoaders, run_epochs, start_networks
from fastreid_u.engine.report import metric_block, recipe_card
from fastreid_u.methods import get_method
from fastreid_u.recipe import Images, Recipe

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset
    from fastreid_u.models import ReIDModel

# A resumed run may be given these anew; anything else would make it another experiment.
_RESUMABLE = {"epochs", "workers", "cache_images", "print_freq", "eval_step", "eval_batch_size"}


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
    dataset: "str | os.PathLike | ReIDDataset",
    *,
    method: str | type[Recipe] = "cluster_contrast",
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
            a ready ``ReIDDataset``. Identities, where known, are used to report ARI, NMI and mAP, never to train.
        method: a name from ``fastreid_u.methods()`` or a ``Recipe`` subclass.
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

    recipe_class = get_method(method)
    folder = Path(logs_dir) if logs_dir is not None else None
    if resume and folder is None:
        raise ValueError("train: logs_dir must name the run to resume, got None")

    name = dataset.name if isinstance(dataset, ReIDDataset) else str(dataset)
    key = known_name(name) or name
    if resume:
        checkpoint.open_folder(folder, resume=True, overwrite=overwrite)
        config = _stored_config(folder, recipe_class, overrides)
    else:
        config = recipe_class.Config.for_dataset(key, **overrides)
        if folder is not None:
            checkpoint.refuse_taken(folder, overwrite=overwrite)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    reid = dataset if isinstance(dataset, ReIDDataset) else _load(dataset, root, data, Display(quiet=quiet))
    if not reid.train:
        raise ValueError(f"train: dataset must hold training images, got none in {reid.root}")
    if recipe_class.uses_source and config.source is not None:
        source_data = {**recipe_class.source_dials.get(known_name(config.source), {}), **dict(source_data or {})}
    labelled = _load_source(recipe_class, config, root, source_data, display=Display(quiet=quiet))
    if labelled is not None and not {s.path for s in reid.train}.isdisjoint(s.path for s in labelled.train):
        raise ValueError(f"train: source must hold other images than the set to learn, got {reid.root} for both")
    recipe = recipe_class(config, _images(reid), _images(labelled, pids=True) if labelled else None)
    model = _build_model(config, device)
    if folder is None:
        folder = _free_folder(f"{reid.name}-{recipe_class.name}")
    if not resume:  # last of all that may be refused: overwriting must not cost the old run for nothing
        checkpoint.open_folder(folder, resume=False, overwrite=overwrite)
    display = Display(folder / "log.txt", quiet=quiet)
    session = _open_session(recipe, reid, labelled, device, display, folder)
    if not resume:
        run = {"method": recipe_class.name, "dataset": name,
               "root": str(reid.root), "fastreid_u": _version(), "torch": torch.__version__, "device": str(device),
               "started": time.strftime("%Y-%m-%d %H:%M:%S")}  # fmt: skip
        options = {"data": dict(data or {}), "source_data": dict(source_data or {})}
        tables = {"run": run, "config": config.to_dict(), **options}
        checkpoint.write_text(folder / "config.toml", dump_toml(tables))

    for line in reid.table().splitlines():
        display.line(line)
    for note in reid.notes:
        display.line(f"note: {note}")
    if labelled is not None:
        display.line(f"learns also from the labelled training images of {labelled.name}:")
        for line in labelled.table().splitlines():
            display.line(line)
    display.line()
    card = recipe_card(recipe_class, config, key, model=model.describe(), device=str(device), selects=_selects(session))
    for line in [*card, f"  run folder  {folder}", ""]:
        display.line(line)

    with display.hearing_warnings():
        start_networks(session, model, calibrate=not resume)
        if resume:
            _restore(session)
        run_epochs(session)

    run = Run(folder, config, session.records, next(iter(session.recipe.ranked().values())).eval())
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
    if session.split.queries is None or not session.recipe.published:
        return text
    return f"{text}, as published" if session.recipe.published_model == "best" else f"{text}; published: the last epoch"


def _load(
    dataset: str | os.PathLike, root: str | os.PathLike | None, data: Mapping[str, Any] | None, display: Display
) -> "ReIDDataset":
    from fastreid_u.data import load_dataset

    with ExitStack() as stack:
        phase: Phase | None = None

        def progress(done: int, total: int) -> None:
            nonlocal phase
            if phase is None:
                display.line(f"rendering {total:,} images, once for these dials")
                phase = stack.enter_context(display.phase("render", total))
            phase(done - phase.done)

        return load_dataset(dataset, root, progress=progress, **dict(data or {}))


def _load_source(
    recipe_class: type[Recipe],
    config: Config,
    root: str | os.PathLike | None,
    data: Mapping[str, Any] | None,
    display: Display,
) -> "ReIDDataset | None":
    """The labelled set of a method that uses one, without images whose identity is unknown."""
    if not recipe_class.uses_source:
        if data:
            raise ValueError(f"train: source_data must be left out for method {recipe_class.name!r}, got {dict(data)}")
        return None
    if config.source is None:
        raise ValueError(f"train: source must name a labelled set for method {recipe_class.name!r}, got None")
    reid = _load(config.source, root, data, display)
    named = tuple(sample for sample in reid.train if sample.pid >= 0) if reid.has_pids else ()
    if not named:
        raise ValueError(f"train: source must have training images with identities, got none in {reid.root}")
    return dataclasses.replace(reid, train=named)


def _build_model(config: Config, device: torch.device) -> "ReIDModel":
    from fastreid_u.models import build_model

    model = build_model(
        config.arch, pooling=config.pooling_type, weights=config.weights, bn_group=config.bn_group,
        bn_running=config.bn_running, stem_relu=config.stem_relu, drop_path=config.drop_path,
        image_size=(config.height, config.width), seed=config.seed,
    )  # fmt: skip
    return model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)


def _open_session(
    recipe: Recipe,
    reid: "ReIDDataset",
    labelled: "ReIDDataset | None",
    device: torch.device,
    display: Display,
    folder: Path,
) -> Session:
    from fastreid_u.data import PixelCache, make_loader, test_transform

    config = recipe.config
    if config.center_per_camera and not reid.has_cameras:
        display.line("warning: center_per_camera has no effect: these data have no camera ids")
    plain = test_transform(config.height, config.width, **config.pixel_statistics())
    augmented = recipe.views()

    def loaders(samples):
        cache: bool | PixelCache = False
        if config.cache_images:  # one cache for both loaders of the same images
            cache = PixelCache(len(samples), config.height, config.width, shared=config.workers > 0)
        common = dict(workers=config.workers, seed=config.seed, cache=cache, pin_memory=device.type == "cuda")
        return (
            make_loader(samples, plain, batch_size=config.eval_batch_size, **common),
            make_loader(samples, augmented, batch_size=config.batch_size, **common),
        )

    split = test_split(reid, display)
    unaugmented, shown = loaders(reid.train)
    return Session(
        recipe=recipe,
        dataset=reid,
        split=split,
        plain=unaugmented,
        augmented=shown,
        source=SourceLoaders(labelled.train, *loaders(labelled.train), BadImageLog(len(labelled.train), display))
        if labelled
        else None,
        ranked=make_loader(
            split.samples, plain, batch_size=config.eval_batch_size, workers=config.workers, cache=config.cache_images,
            seed=config.seed, pin_memory=device.type == "cuda",
        ) if split else None,
        bad_train=BadImageLog(len(reid.train), display),
        bad_test=BadImageLog(len(split.samples), display) if split else None,
        device=device,
        autocast=_autocast(config, device),
        display=display,
        folder=folder,
    )  # fmt: skip


def _images(reid: "ReIDDataset", *, pids: bool = False) -> Images:
    """What a recipe is told of a set; identities, numbered 0 .. P - 1 in their own order, of a source only."""
    camids = torch.tensor([s.camid for s in reid.train]) if reid.has_cameras else None
    known = torch.tensor([s.pid for s in reid.train]).unique(return_inverse=True)[1] if pids else None
    return Images(len(reid.train), camids, known)


def _autocast(config: Config, device: torch.device) -> bool:
    if config.amp == "auto":  # bfloat16 that the CPU only imitates is slower than float32
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return device.type == "cpu" and native is not None and native()
    return config.amp == "bf16"


def _restore(session: Session) -> None:
    """Bring ``session`` to the end of its last finished epoch; later lines of metrics.jsonl are dropped."""
    labels, recipe_state, about = checkpoint.load_state(session.folder, session.recipe.networks, session.optimizer)
    if len(labels) != len(session.dataset.train):
        raise ValueError(
            f"train: the data must be the run's own: it had {len(labels)} training images, {session.dataset.root} has "
            f"{len(session.dataset.train)}"
        )
    session.recipe.load_state(recipe_state)
    session.labels = labels.numpy()
    session.start = about["epoch"] + 1
    lines = (session.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    session.records = [record for record in map(json.loads, lines) if record["epoch"] < session.start]
    checkpoint.write_text(session.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in session.records))
    session.display.line(f"resumed after epoch {about['epoch']}")


def _stored_config(folder: Path, recipe_class: type[Recipe], overrides: Mapping[str, Any]) -> Config:
    stored = load_toml((folder / "config.toml").read_text(encoding="utf-8"))
    if stored["run"]["method"] != recipe_class.name:
        raise ValueError(f"train: method must be the run's own ({stored['run']['method']}), got {recipe_class.name!r}")
    names = [field.name for field in dataclasses.fields(recipe_class.Config)]
    values = {name: stored["config"].get(name) for name in names}  # None is written as a comment, hence absent
    changed = {k: v for k, v in overrides.items() if k not in _RESUMABLE and values.get(k) != v}
    if changed:
        raise ValueError(
            f"train: a resumed run must keep its settings (only {', '.join(sorted(_RESUMABLE))} may change), got "
            + ", ".join(f"{k}={v!r} instead of {values.get(k)!r}" for k, v in changed.items())
        )
    return recipe_class.Config.for_dataset("", **{**values, **overrides})


def _free_folder(name: str) -> Path:
    folder, number = Path("runs") / name, 2
    while checkpoint.holds_run(folder):
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def _version() -> str:
    try:
        return version("fastreid-u")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"

# SPDX-License-Identifier: Apache-2.0
"""A trained network ranks the query images of a data set."""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastreid_u._checks import require_choice
from fastreid_u._default_device import on_cpu
from fastreid_u.engine.arguments import stored_method, stored_root
from fastreid_u.engine.card import metric_block
from fastreid_u.engine.device import Machine, pick_device, uses_bfloat16
from fastreid_u.engine.display import Display
from fastreid_u.engine.evaluate import SplitImages, evaluate_split, test_split
from fastreid_u.engine.folder import RunFolder
from fastreid_u.ops.rerank import STYLES
from fastreid_u.trained.model import Choice, network_and_config, reading_of, run_path

if TYPE_CHECKING:
    from fastreid_u.data import ReIDDataset


@on_cpu()
def evaluate(
    run: str | os.PathLike | None,
    dataset: "str | os.PathLike | ReIDDataset | None" = None,
    *,
    arch: str | None = None,
    root: str | os.PathLike | None = None,
    data: Mapping[str, Any] | None = None,
    which: str = "last",
    ap: str | None = None,
    amp: str | None = None,
    rerank: str | None = None,
    ignore_cameras: bool | None = None,
    batch_size: int | None = None,
    workers: int = 4,
    worker_start: str | None = None,
    truncated_images: bool | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """mAP, mINP and CMC of a trained network, printed and returned as fractions.

    Precision, batch size and formula are the run's own, so on a CPU the figures of an epoch come out again exactly.

    Args:
        run: run folder or model file; with ``arch``, what ``train`` takes as ``weights``.
        arch, amp, **settings: as for ``extract``: a network without a run, and the precision.
        dataset: as for ``train``; default the set that the network was trained on, where the run's folder knows it.
        root: as for ``train``; with the default ``dataset``, the place where the run found it.
        data: the reader's options; with the default ``dataset`` they change the run's own.
        ap: "rank", "sklearn" or "trapezoid", the three formulas in use (equal only without ties; the last differs).
        rerank: "openreid", "zhong" or "clustering": re-rank by that rule of ``fastreid_u.rerank``, with its k1 = 20,
            k2 = 6 and lambda = 0.3, in 4 Q G bytes and its time. Published figures are without, unless they say so.
        ignore_cameras: rank images of the query's own camera too; default as the run did in training.
        batch_size: images per batch; changes speed, and figures in the last bits.
        truncated_images: use images whose file ends early, as far as they go; default as in training.
        which, workers, worker_start, device, quiet: as for ``train`` and ``load_model``.

    Raises:
        ValueError: the data set has neither a query/gallery split nor known identities, or no query has a match; there
            is no split to re-rank; or ``dataset`` must be named: the run was given a ready ``ReIDDataset``, or a model
            file lies alone.
        FileNotFoundError: no such run, or its data are no longer where they were.
    """
    from fastreid_u.data import ReIDDataset, load_dataset
    from fastreid_u.data.same_file import with_shared_files_noted

    if data is not None and not isinstance(data, Mapping):
        raise TypeError(f"evaluate: data must be a mapping of the reader's options, got {data!r}")
    if isinstance(dataset, ReIDDataset) and (data or root is not None):
        raise ValueError(f"evaluate: root and data must be left out with a ready dataset, got {root!r} and {data!r}")
    if rerank is not None:
        require_choice("evaluate", "rerank", rerank, STYLES)
    device = pick_device("evaluate", device)
    model, config = network_and_config("evaluate", run, Choice(arch, settings, which, amp), device)
    if dataset is None and arch is not None:
        raise ValueError("evaluate: dataset must be given for a network without a run, got None")
    if dataset is None:
        dataset, root, data = _own_dataset(run, root, data)
    if isinstance(dataset, ReIDDataset):
        dataset = with_shared_files_noted(dataset)
    else:
        dataset = load_dataset(dataset, root, **dict(data or {}))
    display = Display(quiet=quiet)
    for note in dataset.notes:
        display.line(f"note: {note}")
    if ignore_cameras is None:
        ignore_cameras = config.get("ignore_cameras", False)
    split = test_split(dataset, display, ignore_cameras=ignore_cameras)
    if split is None:
        raise ValueError(f"evaluate: dataset must have a query/gallery split or known identities, got {dataset.root}")
    if rerank is not None and split.queries is None:
        raise ValueError(f"evaluate: dataset must have a query/gallery split to be re-ranked, got {dataset.root}")
    machine = Machine(device, uses_bfloat16(config["amp"], device), display)
    reading = reading_of(
        config, device, batch_size=batch_size, workers=workers, worker_start=worker_start, truncated=truncated_images
    )
    images = SplitImages(replace(split, style=rerank), reading, machine)
    with closing(images), display.hearing_warnings():
        metrics = evaluate_split(model, images, config["ap"] if ap is None else ap)
    if not metrics["queries"]:
        where, hint = (" in another camera", "; ignore_cameras ranks the others") if split.has_cameras else ("", "")
        raise ValueError(f"evaluate: dataset must hold a query with a match{where}, got none in {dataset.root}{hint}")
    if rerank is not None:
        display.line(f"re-ranked, style {rerank}: k1 20, k2 6, lambda 0.3")
    for line in metric_block(metrics):
        display.line(line)
    return metrics


def _own_dataset(
    run: str | os.PathLike, root: str | os.PathLike | None, data: Mapping[str, Any] | None
) -> tuple[str, str | os.PathLike | None, dict[str, Any]]:
    """Name, root and reader's options of the set that a network was trained on; what is given comes over them."""
    from fastreid_u.data import known_name

    path = run_path("evaluate", run)
    folder = RunFolder(path if path.is_dir() else path.parent)
    if not folder.has_settings:  # the model's header holds a name, but not the options, and others may use that name
        raise ValueError(
            f"evaluate: dataset must be given for a model file outside its run's folder, got none for {run}"
        )
    stored = folder.settings("evaluate")
    stored_method("evaluate", folder.config, stored["run"]["method"], to_train=False)
    name, options = stored["run"]["dataset"], stored["data"]
    known = known_name(name)
    if known is None and not os.path.isabs(name):  # empty for a ready ReIDDataset
        raise ValueError(f"evaluate: dataset must be given for a run that was given a ready one, got none for {run}")
    if known is None and root is not None:
        raise ValueError(
            f"evaluate: root must be left out for the run's own folder {name}, got {root}; name the dataset"
        )
    return name, stored_root(name, stored["run"]["root"]) if root is None else root, {**options, **dict(data or {})}

# SPDX-License-Identifier: Apache-2.0
"""What a resumed run may not change, or not without a word."""

import dataclasses
import os
from collections.abc import Iterator, Mapping

from fastreid_u._toml import load_toml
from fastreid_u.engine.arguments import RESUMABLE
from fastreid_u.engine.checkpoint import read_described
from fastreid_u.engine.folder import RunFolder
from fastreid_u.engine.state import State
from fastreid_u.recipe import Recipe

# What train itself writes anew where a run goes on, before its next state. Options of readers are not compared: they
# decide which images there are, and those are.
_MAY_DIFFER = {"run": {"layout", "root", "source_root"}, "config": RESUMABLE}


def compared(now: Mapping[str, str], state: State, root: str | os.PathLike) -> Iterator[str]:
    """What to show of ``now``, the surroundings of a run that goes on, that is not as in its ``state``.

    Raises:
        ValueError: training images below ``root`` have other contents.
    """
    then, until = state.surroundings, f"until epoch {state.epoch}"
    others = sorted(name for name in now if name in then and now[name] != then[name])
    if "contents" in others:
        raise ValueError(
            f"train: the data must be the run's own, got others in {root}: training images of the same names and "
            "sizes hold other bytes"
        )
    for name in others:
        if name == "ranked":
            yield (
                f"warning: the ranked images are others than {until}: mAP before and after cannot be compared, and "
                "model_best is chosen by the images that were ranked first"
            )
        else:
            yield f"note: {name} is {now[name]}, {until} it was {then[name]}: results may differ from an unbroken run's"


def compared_settings(folder: RunFolder, recipe: Recipe, state: State) -> Iterator[str]:
    """What to show of ``config.toml``, of whose settings those in ``state`` are a copy.

    Raises:
        ValueError: it holds others; names each.
    """
    now, then = folder.settings(), load_toml(state.settings)
    changed = [
        f"{table}.{name}={now[table].get(name)!r} instead of {then[table].get(name)!r}"
        for table, free in _MAY_DIFFER.items()
        for name in sorted((now[table].keys() | then.get(table, now[table]).keys()) - free)
        if now[table].get(name) != then.get(table, now[table]).get(name)
    ]
    if changed:
        raise ValueError(
            f"train: {folder.config} must be as train wrote it (only {', '.join(sorted(RESUMABLE))} may change), got "
            f"{', '.join(changed)}; put that back, or start another run"
        )
    unknown = now["config"].keys() - {field.name for field in dataclasses.fields(recipe.config)}
    if unknown:
        yield f"note: {folder.config} names {', '.join(sorted(unknown))}, which method {recipe.name!r} has not"


def compared_best(folder: RunFolder, epoch: int) -> Iterator[str]:
    """What to show where ``model_best`` is not the network that the records until ``epoch`` call the best."""
    best, path = folder.records.best, folder.model_file("best")
    if best is None:
        return
    try:
        found = read_described(path, "train")[1].get("epoch")
        wrong = f"it holds epoch {found}" if found in range(epoch + 1) and found != best["epoch"] else ""
    except FileNotFoundError:
        wrong = "it is gone"
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong:
        yield (
            f"warning: {path} should be the network of epoch {best['epoch']}, {wrong}; a later epoch is saved there "
            f"only if it ranks above mAP {best['mAP']:.1%}"
        )

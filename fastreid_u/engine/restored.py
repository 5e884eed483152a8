# SPDX-License-Identifier: Apache-2.0
"""The tensors of a state, put back where they came from. What was never saved by such a run is refused by name."""

from pathlib import Path

import torch
from torch import Tensor

from fastreid_u.engine.layout_3 import from_layout_3
from fastreid_u.engine.state import State
from fastreid_u.recipe import Recipe

# What torch's optimisers keep for each parameter; all but "step" have the parameter's shape.
_MOMENTS = {
    "adam": {"step", "exp_avg", "exp_avg_sq"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"},
}  # fmt: skip


def load_tensors(recipe: Recipe, optimizer: torch.optim.Optimizer, state: State, path: Path) -> None:
    """Give ``recipe`` and ``optimizer`` the tensors of ``state``, which was read from ``path``.

    Raises:
        ValueError: names the first that is missing, foreign, of another dtype or shape, or out of range.
    """
    try:
        groups = _grouped(from_layout_3(state.tensors, recipe) if state.layout == 3 else state.tensors)
        _require_images(groups[""], recipe.images.count)
        moments = _moments(recipe, optimizer, groups["optimizer"])
        if not moments and state.records is None:  # what has no checksum may have been cut out
            raise ValueError("no moments of the optimiser")
        _load_recipe(recipe, groups["recipe"], same_dtypes=state.layout != 3)
    except ValueError as error:
        raise ValueError(f"train: {path} must be of this run, got {error}") from error
    recipe.images.readable = groups[""]["readable"]
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _grouped(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The recipe's, the optimiser's, and those of the images under ""."""
    groups: dict[str, dict[str, Tensor]] = {"recipe": {}, "optimizer": {}, "": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group in groups and rest:
            groups[group][rest] = tensor
        elif name in ("labels", "readable"):
            groups[""][name] = tensor
        else:
            raise ValueError(f"{name!r}, which no run has")
    return groups


def _require_images(tensors: dict[str, Tensor], count: int) -> None:
    for name, dtype in (("labels", torch.int64), ("readable", torch.bool)):
        if name not in tensors:
            raise ValueError(f"no {name!r}")
        _require_like(name, tensors[name], dtype, (count,))
    least, most = tensors["labels"].min().item(), tensors["labels"].max().item()
    if least < -1 or most >= count:
        raise ValueError(f"labels from {least} to {most} for {count} images")


def _load_recipe(recipe: Recipe, found: dict[str, Tensor], *, same_dtypes: bool) -> None:
    own = recipe.state_dict()
    for name, tensor in found.items():
        if name not in own:
            raise ValueError(f"'recipe.{name}', which method {recipe.name!r} has not")
        if same_dtypes and tensor.dtype != own[name].dtype:
            raise ValueError(f"'recipe.{name}' as {tensor.dtype} instead of {own[name].dtype}")
    try:
        recipe.load_state_dict(found)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.startswith("\t")), str(error))
        raise ValueError(f"another method's or network's tensors ({first[:300]})") from error


def _moments(
    recipe: Recipe, optimizer: torch.optim.Optimizer, found: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state, by the index of the parameter."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kinds = _MOMENTS[recipe.config.optimizer]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        index, _, kind = name.partition(".")
        if not (index.isascii() and index.isdecimal() and int(index) < len(weights)) or kind not in kinds:
            raise ValueError(f"'optimizer.{name}', which {recipe.config.optimizer} of {len(weights)} weights has not")
        weight = weights[int(index)]
        if kind == "step":
            _require_like(f"optimizer.{name}", tensor, torch.float32, ())
        else:
            _require_like(f"optimizer.{name}", tensor, weight.dtype, tuple(weight.shape))
        moments.setdefault(int(index), {})[kind] = tensor
    for index, kept in moments.items():
        if kept.keys() != kinds:
            raise ValueError(f"no 'optimizer.{index}.{min(kinds - kept.keys())}'")
    return moments


def _require_like(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name!r} as {tensor.dtype} of shape {tuple(tensor.shape)} instead of {dtype} of {shape}")

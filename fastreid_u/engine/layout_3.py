# SPDX-License-Identifier: Apache-2.0
"""States that versions before layout 4 wrote, in the names of today."""

import torch
from torch import Tensor

from fastreid_u.recipe import Recipe

# Layout 3 kept a method's networks, memories of instances among them, apart from what else it had to keep.
_RENAMED = {
    "recipe.steps": "recipe._extra_state",
    "recipe.threshold": "recipe.labels.bar",
    "recipe.source_rows": "recipe.memory.features",
}


def from_layout_3(tensors: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """``tensors`` of a finished epoch as ``current_state`` names them.

    What layout 3 did not keep is made anew by the next epoch, and is taken from the fresh ``recipe``.
    """
    fresh = {f"recipe.{name}": tensor for name, tensor in recipe.state_dict().items()}
    found = {_RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    found = {
        f"recipe.{name.removeprefix('networks.')}" if name.startswith("networks.") else name: tensor
        for name, tensor in found.items()
    }
    count = recipe.images.count
    rows = found.get("recipe.memory.features") if "recipe.memory.labels" in found else None
    readable = torch.ones(count, dtype=torch.bool) if rows is None else rows[-count:].any(dim=1)
    if "recipe.memory.labels" in found:  # the memory takes the means of these clusters when it is loaded
        fresh.pop("recipe.memory.cluster_means", None)
    return {**fresh, "readable": readable, **found}

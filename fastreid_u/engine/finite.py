# SPDX-License-Identifier: Apache-2.0
"""Whether tensors hold NaN or infinity: looked for before they are saved, and in what is read."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


def not_finite(tensors: Mapping[str, Tensor], but: Collection[str] = ()) -> str:
    """The name of the first tensor that holds NaN or infinity, those in ``but`` left out; empty if none does.

    One pass over the tensors, without memory of its own.
    """
    return next((name for name, tensor in tensors.items() if name not in but and _is_wrong(tensor)), "")


def wrong_weight(network: nn.Module) -> str:
    """The same of a network's parameters and BatchNorm statistics; other buffers may be masks, which hold infinity."""
    statistics = {name: b for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return not_finite(dict(network.named_parameters()) | statistics)


def require_finite(tensors: Mapping[str, Tensor], epoch: int, but: Collection[str]) -> None:
    """What is about to be saved of ``epoch`` is finite, except those in ``but``.

    Raises:
        FloatingPointError: names the first tensor that is not.
    """
    wrong = not_finite(tensors, but)
    if wrong:
        raise FloatingPointError(
            f"train: {wrong} must be finite after epoch {epoch}, got NaN or infinity: the network has diverged. The "
            "epochs before are saved. Start another run with a lower lr, a higher temp, or in float32 (amp=off): this "
            "one would end here again"
        )


def _is_wrong(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    return not bool(torch.isfinite(torch.stack(tensor.aminmax())).all())  # NaN is its own least and greatest

# SPDX-License-Identifier: Apache-2.0
"""Whether tensors hold NaN or infinity: looked for before they are saved, and in what is read."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor], but: Collection[str] = ()) -> str:
    """The name of the first tensor that holds NaN or infinity, those in ``but`` left out; empty if none does.

    One pass over the tensors, and a byte of memory for each number of the largest.
    """
    return next((name for name, tensor in tensors.items() if name not in but and _is_wrong(tensor)), "")


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
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())

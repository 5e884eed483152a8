# SPDX-License-Identifier: Apache-2.0
"""Errors that a kernel finds in data on a GPU, kept until the host waits for the GPU anyway.

A kernel of a training step must not make the host wait, so it sets a bit of a flag on its device and leaves its result
unchanged or NaN. ``raise_flagged`` reads the flags; call it where the host waits, as when it prints a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the bits of a flag mean; the kernels know them by the same numbers.
MEANING = {
    1: "targets must lie in [0, C), got one outside",
    2: "x must be finite, got NaN or infinity",
    4: "clusters must have a proxy each, got one without",
    8: "targets must be True in class_mask, got one that is masked",
}

_flags: dict[tuple[str, torch.device], Tensor] = {}


def flag(op: str, device: torch.device) -> Tensor:
    """The (1,) int32 flag of ``op`` on ``device``: one for the life of the process, so CUDA graphs may hold it."""
    if (op, device) not in _flags:
        _flags[op, device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[op, device]


def raise_flagged() -> None:
    """Wait for the devices and raise what kernels have flagged since the last call.

    Raises:
        ValueError: the first error found; every flag is cleared.
    """
    found = {key: int(tensor) for key, tensor in _flags.items()}
    for tensor in _flags.values():
        tensor.zero_()
    for (op, device), bits in found.items():
        for bit, meaning in MEANING.items():
            if bits & bit:
                raise ValueError(f"{op}: {meaning} (seen on {device}; FASTREID_U_CHECK=1 raises at the call)")

# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, one sample after the other.

Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, equations 2 and 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def momentum_update_(
    memory: Tensor,
    x: Tensor,
    targets: Tensor,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    found_inf: Tensor | None = None,
) -> Tensor:
    """``row = l2(momentum * row + (1 - momentum) * l2(x_b))`` in place, for the samples that ``rule`` picks.

    "sequential": every sample, in batch order. "hard": per row one sample, the least similar to the row as it was
    before the batch, the first such on ties. Targets of -1 are skipped; nothing happens if ``found_inf`` is not 0.
    """
    if found_inf is not None and bool(found_inf.any()):
        return memory
    x = F.normalize(x.to(memory.dtype), dim=1, eps=1e-12)
    labels = targets.tolist()
    if rule == "sequential":
        chosen = [b for b, row in enumerate(labels) if row != -1]
    elif rule == "hard":
        members: dict[int, list[int]] = {}
        for b, row in enumerate(labels):
            if row != -1:
                members.setdefault(row, []).append(b)
        chosen = []
        for row, samples in members.items():
            similarity = (x[samples] @ memory[row]).tolist()
            chosen.append(samples[similarity.index(min(similarity))])
    else:
        raise ValueError(f"momentum_update_: rule must be one of 'sequential', 'hard', got {rule!r}")
    for b in chosen:
        row = memory[labels[b]]
        row.mul_(momentum).add_(x[b], alpha=1 - momentum)
        row.div_(row.norm().clamp(min=1e-12))
    return memory

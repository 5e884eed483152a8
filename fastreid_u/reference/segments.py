# SPDX-License-Identifier: Apache-2.0
"""Sums and means of the rows that share a label."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(x: Tensor, labels: Tensor, num_segments: int | None = None) -> Tensor:
    """(C, D): row c is the sum of the rows of ``x`` labelled c, in their order; label -1 is left out."""
    x = x if x.dtype == torch.float64 else x.float()
    members = labels.tolist()
    count = max(members, default=-1) + 1 if num_segments is None else num_segments
    rows = [x.new_zeros(x.shape[1]) for _ in range(count)]
    for i, label in enumerate(members):
        if label != -1:
            rows[label] = rows[label] + x[i]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


def segment_mean(x: Tensor, labels: Tensor, num_segments: int | None = None) -> Tensor:
    """``segment_sum`` divided by how many rows each label has; zeros where it has none."""
    total = segment_sum(x, labels, num_segments)
    members = labels.tolist()
    count = torch.tensor([max(members.count(c), 1) for c in range(len(total))], dtype=total.dtype, device=total.device)
    return total / count.to(total.device)[:, None]

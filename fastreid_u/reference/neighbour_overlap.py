# SPDX-License-Identifier: Apache-2.0
"""Jaccard similarity of two neighbour lists per row; the cross agreement of Cho et al., PPLR, CVPR 2022."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbour_overlap(a: Tensor, b: Tensor) -> Tensor:
    """(N,) float32: ``|A & B| / |A | B|`` of the sets in each row; negative entries are padding; empty sets give 0."""
    scores = []
    for row_a, row_b in zip(a.tolist(), b.tolist(), strict=True):
        set_a, set_b = ({j for j in row if j >= 0} for row in (row_a, row_b))
        scores.append(len(set_a & set_b) / max(len(set_a | set_b), 1))
    return torch.tensor(scores, dtype=torch.float32, device=a.device)

# SPDX-License-Identifier: Apache-2.0
"""What the losses between two views of a batch have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u.reference.products import inner_products


def view_cosines(op: str, x: Tensor, teacher: Tensor) -> Tensor:
    """(B, B) in float32 or wider, also under autocast; no gradient flows to the teacher."""
    if x.ndim != 2 or x.shape != teacher.shape:
        shapes = f"{tuple(x.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{op}: both views must be (B, D) of one size, got {shapes}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, teacher.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return inner_products(F.normalize(x.to(dtype), dim=1), F.normalize(teacher.detach().to(dtype), dim=1))


def mean(each: Tensor) -> Tensor:
    """0 for an empty batch."""
    return each.sum() / max(len(each), 1)

# SPDX-License-Identifier: Apache-2.0
"""A teacher's weights as the moving average of a student's; Tarvainen and Valpola, "Mean teachers", NeurIPS 2017."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, alpha: float) -> nn.Module:
    """``teacher = alpha * teacher + (1 - alpha) * student`` for every parameter; buffers stay."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.mul_(alpha).add_(new.to(old.dtype), alpha=1 - alpha)
    return teacher

# SPDX-License-Identifier: Apache-2.0
"""Sums and means of the rows that share a label, with the same bits every time.

Plain torch on every device: one pass over the rows, which is all there is to gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_2d,
    require_floating,
    require_ids,
    require_int_at_least,
    require_same_device,
    require_same_length,
    require_values_in,
)
from fastreid_u._label_checks import require_cluster_numbers


def segment_sum(x: Tensor, labels: Tensor, num_segments: int | None = None) -> Tensor:
    """The sum of the rows of each label: ``out[c] = sum of x[i] over labels[i] == c``.

    Args:
        x: (N, D) floating point, any device.
        labels: (N,) integers on the same device; -1 leaves a row out.
        num_segments: C, number of rows of the result. None takes the largest label plus 1, for which a GPU must be
            waited for; give it in a training step.

    Returns:
        (C, D) float32 (float64 for float64) on ``x``'s device; zeros for a label that no row has. Differentiable.
        Summed in the order of the rows on a CPU and without atomics on a GPU: the same bits every time. No memory
        beyond the result and one integer per row.

    Raises:
        TypeError, ValueError: wrong type or shape; a label below -1 or not below ``num_segments`` (seen on a CPU, on a
        GPU with ``FASTREID_U_CHECK=1``); without ``num_segments``, one far above N (from 100,000 + 10 N on).
    """
    return _sum(*_checked("segment_sum", x, labels, num_segments))


def segment_mean(x: Tensor, labels: Tensor, num_segments: int | None = None) -> Tensor:
    """The mean of the rows of each label; everything else as in ``segment_sum``."""
    x, labels, count = _checked("segment_mean", x, labels, num_segments)
    return _sum(x, labels, count) / segment_sizes(labels, count).clamp(min=1).to(x.dtype)[:, None]


def segment_sizes(labels: Tensor, num_segments: int) -> Tensor:
    """(C,) int64: how many rows have each label; -1 is not counted. Waits for no GPU."""
    sizes = labels.new_zeros(num_segments + 1)  # the last takes the rows that are left out
    return sizes.scatter_add_(0, _slots(labels, num_segments), torch.ones_like(labels))[:num_segments]


def _checked(op: str, x: Tensor, labels: Tensor, num_segments: int | None) -> tuple[Tensor, Tensor, int]:
    x = require_floating(op, "x", require_2d(op, "x", as_tensor(op, "x", x)))
    labels = require_ids(op, "labels", labels)
    require_same_length(op, "labels", labels, "x", x)
    require_same_device(op, "labels", labels, "x", x)
    if num_segments is None:
        require_cluster_numbers(op, "labels", labels)
        num_segments = int(labels.max()) + 1 if len(labels) else 0
    else:
        num_segments = require_int_at_least(op, "num_segments", num_segments, 0)
        require_values_in(op, "labels", labels, 0, num_segments, ignore=-1)
    return x if x.dtype == torch.float64 else x.float(), labels, num_segments


def _sum(x: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    out, slots = x.new_zeros(num_segments + 1, x.shape[1]), _slots(labels, num_segments)
    if x.device.type == "cpu":
        out = out.index_add(0, slots, x)  # row after row
    else:
        out = out.index_put((slots,), x, accumulate=True)  # sorts, where index_add would race
    return out[:num_segments]


def _slots(labels: Tensor, num_segments: int) -> Tensor:
    return torch.where(labels < 0, num_segments, labels)

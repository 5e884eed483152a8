# SPDX-License-Identifier: Apache-2.0
"""Labels in which un-clustered points are classes of their own, as methods with a memory of instances want them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_u._checks import require_ids, require_values_in


def require_labels(op: str, name: str, labels: object) -> Tensor:
    """(N,) integers of at least -1, as int64; such labels are small enough to be counted."""
    labels = require_ids(op, name, labels)
    return require_values_in(op, name, labels, -1, max(1, 2 * len(labels)), always=True)


def own_classes(labels: Tensor, among: Tensor | None = None) -> Tensor:
    """Noise points become classes of their own, numbered after the clusters in the order of their index.

    Args:
        labels: (N,) integers, -1 for noise.
        among: (N,) bool, the points that may; the others stay noise. None for all.
    """
    noise = labels < 0
    return move_out(labels, noise if among is None else noise & among)


def move_out(labels: Tensor, moved: Tensor) -> Tensor:
    """The points ``moved`` (N,) bool become classes of their own, after all others in the order of their index."""
    fresh = moved.cumsum(0) + (labels.max() if len(labels) else 0)
    return torch.where(moved, fresh, labels)


def sizes(labels: Tensor) -> Tensor:
    """(N,) how many points each point's class has, the point itself included."""
    return labels.bincount()[labels] if len(labels) else labels


def without_singletons(labels: Tensor) -> Tensor:
    """-1 for points alone in their class; the other classes numbered 0, 1, ... in their old order."""
    found = torch.full_like(labels, -1)
    kept = sizes(labels) > 1
    found[kept] = labels[kept].unique(return_inverse=True)[1]
    return found


def shared_sizes(a: Tensor, b: Tensor) -> Tensor:
    """(N,) how many points share both classes of each point: the counts of the contingency table, by sorting."""
    if len(a) == 0:
        return a
    cell = a * (b.max() + 1) + b
    _, name, count = cell.unique(return_inverse=True, return_counts=True)
    return count[name]

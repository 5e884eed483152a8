# SPDX-License-Identifier: Apache-2.0
"""Agreement of two neighbour lists of every sample.

Plain torch: an index that both lists hold stands twice in the sorted union, so one sort of short rows replaces the
loops over sets of published code, and runs once an epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_u._checks import as_tensor, require_2d, require_integer, require_same_device, require_same_length


def neighbour_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Jaccard similarity ``|A & B| / |A | B|`` of two lists of neighbours for each sample: PPLR's cross agreement.

        _, whole = knn(features, 21)
        _, part = knn(part_features, 21)
        agreement = neighbour_overlap(whole[:, 1:], part[:, 1:])       # without each sample itself

    Args:
        a: (N, K) integers, any device; a row holds no index twice. Negative entries are padding and match nothing.
        b: (N, L) integers on the same device.

    Returns:
        (N,) float32 in [0, 1]; 0 where both lists are empty. Memory: about 24 N (K + L) bytes.

    Raises:
        TypeError, ValueError: wrong type or shape, an index twice in a row.

    Cho et al., PPLR, CVPR 2022.
    """
    op = "neighbour_overlap"
    a = require_integer(op, "a", require_2d(op, "a", as_tensor(op, "a", a))).long()
    b = require_integer(op, "b", require_2d(op, "b", as_tensor(op, "b", b))).long()
    require_same_length(op, "b", b, "a", a)
    require_same_device(op, "b", b, "a", a)
    for name, lists in (("a", a), ("b", b)):
        twice = _twice(lists)
        if twice.any():
            row = int(twice.nonzero()[0])
            raise ValueError(f"{op}: {name} must hold no index twice in a row, got {lists[row].tolist()} in row {row}")
    common = _twice(torch.cat([a, b], dim=1))
    union = (a >= 0).sum(dim=1) + (b >= 0).sum(dim=1) - common
    return common.float() / union.clamp(min=1)


def _twice(lists: Tensor) -> Tensor:
    """How many neighbours of each row, once sorted, are equal and no padding."""
    ordered = lists.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum(dim=1)

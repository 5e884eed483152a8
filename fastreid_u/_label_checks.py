# SPDX-License-Identifier: Apache-2.0
"""Labels that come from outside: from a clustering of one's own, or another library's."""

from torch import Tensor

from fastreid_u._checks import as_tensor, require_1d, require_integer, require_values_in


def require_clustering(op: str, name: str, x: object, count: int) -> Tensor:
    """What a clustering returns of ``count`` images: (count,) whole numbers of any type; as int64, -1 for negative."""
    x = require_1d(op, name, as_tensor(op, name, x))
    if len(x) != count:
        raise ValueError(f"{op}: {name} must have one entry for each image ({count}), got {len(x)}")
    if x.is_floating_point():
        broken = x[~(x == x.round())]  # NaN too
        if len(broken):
            raise ValueError(f"{op}: {name} must be whole numbers, got {broken[0].item():g}")
        x = x.double().clamp(-1, 2.0**62)  # infinity is above the limit, as are numbers that int64 does not have
    x = require_integer(op, name, x.long() if x.is_floating_point() or len(x) == 0 else x).long().clamp(min=-1)
    if len(x) and x.max() >= label_limit(count):
        raise ValueError(f"{op}: {name} must be below {label_limit(count)} for {count} images, got {int(x.max())}")
    return x


def label_limit(count: int) -> int:
    """Labels of ``count`` images lie below it.

    A row each is set aside up to the largest, and what is far beyond the number of images is no cluster but another
    library's mark for noise, such as 2147483647.
    """
    return 100_000 + 10 * count


def require_cluster_numbers(op: str, name: str, labels: Tensor) -> Tensor:
    """Labels for which a row each is set aside up to the largest: -1 for none, else below ``label_limit``."""
    return require_values_in(op, name, labels, -1, label_limit(len(labels)), always=True)

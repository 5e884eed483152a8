# SPDX-License-Identifier: Apache-2.0
"""Mean feature of each cluster: the start of a cluster memory."""

from __future__ import annotations

from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_1d,
    require_features,
    require_integer,
    require_same_device,
    require_same_length,
    require_values_in,
)
from fastreid_u.ops._dispatch import choose
from fastreid_u.reference import centroids as reference


def cluster_centroids(x: Tensor, labels: Tensor, *, normalize: bool = True, backend: str = "auto") -> Tensor:
    """The mean of the rows of each cluster, by default scaled to unit length.

    Args:
        x: (N, D) floating point, any device; taken in float32, averaged as given (not normalised first).
        labels: (N,) integers on the same device, -1 for noise, which is ignored.
        normalize: divide each mean by its length; a mean of zero length stays zero.
        backend: "auto" or "reference"; anything but "auto" runs there or raises.

    Returns:
        (C, D) float32 on ``x``'s device, C = largest label + 1; a label that nobody has gets a row of zeros.
        The same bits every time.

    Raises:
        TypeError, ValueError: wrong type or shape, NaN or infinity, a label below -1.

    Not differentiable. Dai et al., Cluster Contrast, ACCV 2022, section 3.2.
    """
    op = "cluster_centroids"
    x = require_features(op, "x", x)
    labels = require_integer(op, "labels", require_1d(op, "labels", as_tensor(op, "labels", labels))).long()
    require_same_length(op, "labels", labels, "x", x)
    require_same_device(op, "labels", labels, "x", x)
    require_values_in(op, "labels", labels, -1, 2**62, always=True)
    run = choose(op, x.device, backend, {"reference": reference.cluster_centroids})
    return run(x, labels, normalize=normalize)

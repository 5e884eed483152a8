# SPDX-License-Identifier: Apache-2.0
"""Mean feature of each cluster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def cluster_centroids(x: Tensor, labels: Tensor, *, normalize: bool = True) -> Tensor:
    """(C, D): row c is the mean of the rows of ``x`` labelled c, scaled to unit length if ``normalize``.

    C is the largest label plus 1. Label -1 is noise and ignored; a label that nobody has gets a row of zeros.
    """
    x = x if x.dtype == torch.float64 else x.float()
    order = labels.argsort(stable=True)
    order = order[int((labels < 0).sum()) :]
    count = labels[order].bincount().tolist() if len(order) else []
    centroids = x.new_zeros(len(count), x.shape[1])
    for row, members in zip(centroids, order.split(count), strict=True):
        if len(members):
            row.copy_(x[members].mean(dim=0))
    return F.normalize(centroids, dim=1, eps=1e-12) if normalize else centroids

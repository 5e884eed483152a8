# SPDX-License-Identifier: Apache-2.0
"""Mean feature of each cluster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def cluster_centroids(x: Tensor, labels: Tensor, *, normalize: bool = True) -> Tensor:
    """(C, D): row c is the mean of the rows of ``x`` labelled c, scaled to unit length if ``normalize``.

    C is the largest label plus 1. Label -1 is noise and ignored; a label that no row has gets zeros.
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


@torch.no_grad()
def proxy_centroids(
    x: Tensor, labels: Tensor, cameras: Tensor, *, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each pair of camera and cluster that occurs, cameras ascending, in each the clusters ascending.

    Row: the mean of the features of the pair, scaled to unit length if ``normalize``. With it its cluster and camera.
    """
    x = x if x.dtype == torch.float64 else x.float()
    pairs = sorted({(a, c) for a, c in zip(cameras.tolist(), labels.tolist(), strict=True) if c >= 0})
    rows = [x[(cameras == a) & (labels == c)].mean(dim=0) for a, c in pairs]
    proxies = torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])
    if normalize:
        proxies = F.normalize(proxies, dim=1, eps=1e-12)
    return proxies, labels.new_tensor([c for _, c in pairs]), cameras.new_tensor([a for a, _ in pairs])

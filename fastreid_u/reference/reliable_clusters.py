# SPDX-License-Identifier: Apache-2.0
"""SpCL's reliability criterion from N x N label similarities, as published."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Labels (N,), the threshold or None, and the scores (N,) of the points."""

    labels: Tensor
    threshold: float | None
    compactness: Tensor
    independence: Tensor


def own_classes(labels: Tensor) -> Tensor:
    """Noise points become classes of their own, numbered after the clusters in the order of their index."""
    labels = labels.clone()
    fresh = int(labels.max()) + 1 if len(labels) else 0
    for i in range(len(labels)):
        if labels[i] == -1:
            labels[i] = fresh
            fresh += 1
    return labels


def without_singletons(labels: Tensor) -> Tensor:
    """-1 for points alone in their class; the other classes numbered 0, 1, ... in their old order."""
    found = torch.full_like(labels, -1)
    fresh = 0
    for c in labels.unique().tolist():
        if (labels == c).sum() > 1:
            found[labels == c] = fresh
            fresh += 1
    return found


def reliable_clusters(
    labels: Tensor,
    labels_tight: Tensor,
    labels_loose: Tensor,
    *,
    threshold: float | None = None,
    keep: float = 0.9,
    singletons: bool = True,
) -> Kept:
    """Keep a point in its cluster if the cluster is independent enough and no member of it is more compact.

    The published code works with one minus these scores, and so with the least where these are the most.
    """
    labels, tight, loose = (own_classes(each) for each in (labels, labels_tight, labels_loose))

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        sim_a, sim_b = (a[:, None] == a).double(), (b[:, None] == b).double()
        return torch.minimum(sim_a, sim_b).sum(dim=1) / torch.maximum(sim_a, sim_b).sum(dim=1)

    compactness, independence = overlap(labels, tight), overlap(labels, loose)
    most_compact, most_independent, clusters = {}, {}, []
    for c in labels.unique().tolist():
        most_compact[c] = compactness[labels == c].max()
        most_independent[c] = float(independence[labels == c].max())
        if (labels == c).sum() > 1:
            clusters.append(most_independent[c])
    if threshold is None and clusters:
        clusters.sort(reverse=True)
        threshold = clusters[min(len(clusters) - 1, round(keep * len(clusters)))]

    found = labels.clone()
    fresh = int(labels.max()) + 1 if len(labels) else 0
    for i in range(len(labels)):
        c = int(labels[i])
        reliable = threshold is None or most_independent[c] >= threshold
        if not (reliable and compactness[i] >= most_compact[c]):
            found[i] = fresh
            fresh += 1
    if not singletons:
        found = without_singletons(found)
    return Kept(found, threshold, compactness, independence)

# SPDX-License-Identifier: Apache-2.0
"""CACL's cluster refinement from N x N matrices, as published, and the rule that its text describes."""

from __future__ import annotations

import torch
from torch import Tensor

from .jaccard import jaccard_distance
from .reliable_clusters import own_classes, without_singletons


def scores(distance: Tensor, labels: Tensor, labels_tight: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """(N,) what each point's tight part scores, and what its cluster does; a point stays where the first is lower.

    ``labels`` and ``labels_tight`` hold no -1. "official": the spread of a cluster is its sum of distances over n^2;
    that of a tight part sums, over its points, the distances to those that joined or left the point's cluster over the
    square of their number. "mean_to_cluster": mean distance of the part's points to all others of the cluster, against
    the mean of the cluster.
    """
    distance = distance.double().clone().fill_diagonal_(0)
    same = labels[:, None] == labels
    tight = labels_tight[:, None] == labels_tight
    cluster, part = torch.zeros(2, len(labels), dtype=torch.float64, device="cpu")
    for i in range(len(labels)):
        members = same[i]
        n = members.sum()
        if rule == "official":
            cluster[i] = distance[members][:, members].sum() / n**2
            changed = (same != tight)[tight[i]]
            count = changed.sum(dim=1).clamp(min=1)
            part[i] = ((distance[tight[i]] * changed).sum(dim=1) / count**2).sum()
        elif n > 1:
            cluster[i] = distance[members][:, members].sum() / (n * (n - 1))
            mine = members & tight[i]
            # a part that is its cluster stays, whatever the ratio
            part[i] = distance[mine][:, members].sum() / (mine.sum() * (n - 1)) if mine.sum() < n else 0
    return part, cluster


def refine_clusters(
    x: Tensor | None,
    labels: Tensor,
    labels_tight: Tensor,
    *,
    rule: str = "official",
    ratio: float = 1.0,
    k1: int = 30,
    k2: int | None = None,
    knn: tuple[Tensor, Tensor] | None = None,
    compat: bool = False,
    graph: Tensor | None = None,
    singletons: bool = True,
) -> Tensor:
    """Points become classes of their own where ``ratio`` times the score of their part is above their cluster's.

    ``graph``: (N, N) distances instead of ``x``.
    """
    labels, labels_tight = own_classes(labels), own_classes(labels_tight)
    if rule != "none" and len(labels):
        distance = jaccard_distance(x, k1, k2, knn=knn, compat=compat) if graph is None else graph
        part, cluster = scores(distance, labels, labels_tight, rule)
        found = labels.clone()
        fresh = int(labels.max()) + 1
        for i in range(len(labels)):
            if ratio * part[i] > cluster[i]:
                found[i] = fresh
                fresh += 1
        labels = found
    return labels if singletons else without_singletons(labels)

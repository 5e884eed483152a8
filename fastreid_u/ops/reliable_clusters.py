# SPDX-License-Identifier: Apache-2.0
"""Which clusters to trust: those that a tighter and a looser clustering agree with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastreid_u._checks import require_in_range, require_same_device, require_same_length
from fastreid_u.ops.label_classes import (
    move_out,
    own_classes,
    require_labels,
    shared_sizes,
    sizes,
    without_singletons,
)


@dataclass(frozen=True, eq=False)
class ReliableClusters:
    """What the criterion leaves of a clustering.

    Attributes:
        labels: (N,) int64, the labels after the criterion.
        threshold: the least independence a cluster needs; give it back in the next epoch. None if there was no
            cluster yet to take it from.
        compactness: (N,) float64 in (0, 1], how much of a point's cluster the tight clustering shares.
        independence: (N,) float64 in (0, 1], the same for the loose clustering.
    """

    labels: Tensor
    threshold: float | None
    compactness: Tensor
    independence: Tensor


def reliable_clusters(
    labels: Tensor,
    labels_tight: Tensor,
    labels_loose: Tensor,
    *,
    threshold: float | None = None,
    keep: float = 0.9,
    singletons: bool = True,
) -> ReliableClusters:
    """SpCL's reliability criterion: dissolve clusters that hang on eps, and drop the members that do.

    A point's compactness is |A and T| / |A or T| of its cluster A and its cluster T in ``labels_tight``, its
    independence the same with ``labels_loose``; a cluster scores as its best member. A point keeps its label if its
    cluster's independence is at least ``threshold`` and its own compactness is its cluster's; else it becomes a class
    of its own.

    Args:
        labels: (N,) integers, -1 for noise; usually ``pseudo_labels(x, eps=[0.6, 0.58, 0.62])``, one row for each.
        labels_tight, labels_loose: (N,) of the same points at a smaller and at a larger eps, on the same device.
        threshold: None in the first epoch, which takes it from the clusters of more than one point: that of the
            cluster at position round-half-even(keep * C), at most C - 1, in order of falling independence. Later epochs
            pass ``threshold`` of the first one's result.
        keep: in [0, 1], used when ``threshold`` is None; as published.
        singletons: True numbers the labels as published: noise takes new classes after the clusters, points that are
            dropped take new ones after those, both in the order of their index, and a class that loses all its
            members stays empty. False gives -1 to every point alone in its class, clusters 0 .. C - 1 in their old
            order.

    Returns:
        :class:`ReliableClusters`: ``labels`` (N,) int64, ``threshold``, ``compactness`` and ``independence`` (N,)
        float64, on the device of ``labels``.

    Raises:
        TypeError, ValueError: wrong type, shape, length or device; labels below -1 or beyond 2 N; numbers out of range.

    Scores are quotients of counts: equal ones are equal in float64 and different ones different up to 2^26 points, so
    no comparison is decided by rounding. O(N log N), no more than 100 N bytes. The published code builds five N x N
    matrices, scores one minus these, and stops with an index error if the first epoch finds no cluster; here
    ``threshold`` then stays None, to be taken from the first epoch that does.
    Ge et al., "Self-paced Contrastive Learning", NeurIPS 2020, section 3.3.
    """
    op = "reliable_clusters"
    labels = require_labels(op, "labels", labels)
    others = {}
    for name, other in (("labels_tight", labels_tight), ("labels_loose", labels_loose)):
        others[name] = require_labels(op, name, other)
        require_same_length(op, name, others[name], "labels", labels)
        require_same_device(op, name, others[name], "labels", labels)
    if threshold is not None:
        threshold = require_in_range(op, "threshold", threshold, 0, 1)
    keep = require_in_range(op, "keep", keep, 0, 1)

    labels = own_classes(labels)
    compactness, independence = (_overlap(labels, own_classes(other)) for other in others.values())
    most_compact, most_independent = _best(labels, compactness), _best(labels, independence)
    if threshold is None:
        clusters = most_independent[labels.bincount() > 1].sort(descending=True).values
        if len(clusters):
            threshold = float(clusters[min(len(clusters) - 1, round(keep * len(clusters)))])

    kept = compactness == most_compact[labels]
    if threshold is not None:
        kept &= (most_independent >= threshold)[labels]
    found = move_out(labels, ~kept)
    return ReliableClusters(found if singletons else without_singletons(found), threshold, compactness, independence)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """(N,) share of the points in either class of each point that are in both."""
    both = shared_sizes(a, b)
    return both.double() / (sizes(a) + sizes(b) - both)


def _best(labels: Tensor, score: Tensor) -> Tensor:
    """(C,) the highest score in each class; 0 for a number that no point has."""
    best = score.new_zeros(int(labels.max()) + 1 if len(labels) else 0)
    return best.scatter_reduce_(0, labels, score, "amax")

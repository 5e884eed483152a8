# SPDX-License-Identifier: Apache-2.0
"""How good an epoch's pseudo-labels look: without true labels, and against them where they exist."""

from typing import Any

import numpy as np


def as_partition(labels: np.ndarray) -> np.ndarray:
    """Labels (N,) with every un-clustered image (-1) as a cluster of its own.

    Scores over this partition count all N images: leaving the un-clustered out, or lumping them together, would
    flatter a labelling that clusters only the easy ones.
    """
    labels = np.asarray(labels).copy()
    alone = labels < 0
    labels[alone] = labels.max(initial=-1) + 1 + np.arange(alone.sum())
    return labels


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index of two labellings over all images; 1 = the same partition, 0 = chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(as_partition(a), as_partition(b)))


def label_health(labels: np.ndarray, previous: np.ndarray | None, pids: np.ndarray | None) -> dict[str, Any]:
    """Counts of ``labels`` (N,), agreement with the ``previous`` epoch's, ARI and NMI against ``pids`` (-1 = unknown).

    Quantities that cannot be had (first epoch, no true labels) are None.
    """
    labels = np.asarray(labels)
    sizes = np.unique(labels[labels >= 0], return_counts=True)[1]
    health: dict[str, Any] = {
        "clusters": len(sizes),
        "unclustered": float((labels < 0).mean()) if len(labels) else 0.0,
        "largest": int(sizes.max(initial=0)),
        "agreement": None if previous is None else agreement(labels, previous),
        "ari": None,
        "nmi": None,
    }
    if pids is not None and (known := np.asarray(pids) >= 0).any():
        from sklearn.metrics import normalized_mutual_info_score

        ours, truth = as_partition(labels[known]), np.asarray(pids)[known]
        health["ari"] = agreement(labels[known], truth)
        health["nmi"] = float(normalized_mutual_info_score(truth, ours))
    return health

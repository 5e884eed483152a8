# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels: neighbours, Jaccard distances, scikit-learn's DBSCAN on all pairs."""

import time

import numpy as np
from sklearn.cluster import DBSCAN
from torch import Tensor

from published.jaccard import jaccard
from published.search import search


def label(
    features: Tensor, *, k1: int = 30, k2: int = 6, eps: float = 0.6, min_samples: int = 4
) -> tuple[np.ndarray, dict[str, float]]:
    """(N,) labels, -1 for what is in no cluster; and the seconds of each part."""
    clock = [time.perf_counter()]
    ranking = search(features, k1)
    clock.append(time.perf_counter())
    distance = jaccard(features, ranking, k1, k2)
    clock.append(time.perf_counter())
    labels = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed", n_jobs=-1).fit_predict(distance)
    clock.append(time.perf_counter())
    return labels, dict(zip(("search", "jaccard", "dbscan"), np.diff(clock).tolist(), strict=True))

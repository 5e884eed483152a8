# SPDX-License-Identifier: Apache-2.0
"""Ranking: every distance of queries and gallery, each row sorted in full, scikit-learn's average precision."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from published.images import Sample


class Scores(NamedTuple):
    mAP: float
    cmc: np.ndarray  # (topk,): share of queries with a match among the first k


def distances(query: Tensor, gallery: Tensor) -> np.ndarray:
    """(Q, G) squared Euclidean distances, float32."""
    size = query.pow(2).sum(dim=1, keepdim=True) + gallery.pow(2).sum(dim=1)
    return torch.addmm(size, query, gallery.t(), beta=1, alpha=-2).numpy()


def rank(distance: np.ndarray, query: Sequence[Sample], gallery: Sequence[Sample], topk: int = 100) -> Scores:
    """Gallery images of the query's person and camera are left out, and queries without a match."""
    q_pids, q_cams = (np.array([sample[part] for sample in query]) for part in (1, 2))
    g_pids, g_cams = (np.array([sample[part] for sample in gallery]) for part in (1, 2))
    order = np.argsort(distance, axis=1)
    matches = g_pids[order] == q_pids[:, np.newaxis]
    precisions, firsts = [], np.zeros(topk)
    for i in range(len(query)):
        valid = (g_pids[order[i]] != q_pids[i]) | (g_cams[order[i]] != q_cams[i])
        truth = matches[i, valid]
        if not np.any(truth):
            continue
        precisions.append(average_precision_score(truth, -distance[i][order[i]][valid]))
        first = np.where(truth)[0][0]
        if first < topk:
            firsts[first] += 1
    return Scores(float(np.mean(precisions)), firsts.cumsum() / len(precisions))

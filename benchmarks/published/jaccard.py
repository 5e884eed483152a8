# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal Jaccard distance (Zhong et al., CVPR 2017): a loop over the rows for each of its steps, dense N x N."""

import numpy as np
import torch
from torch import Tensor


def reciprocal(ranking: np.ndarray, i: int, k: int) -> np.ndarray:
    """Those of the ``k`` nearest of row ``i`` that have it among their own ``k`` nearest."""
    forward = ranking[i, :k]
    backward = ranking[forward, :k]
    return forward[np.where(backward == i)[0]]


def jaccard(features: Tensor, ranking: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """(N, N) float32 distances in [0, 1] from unit rows and their neighbours (N, k1)."""
    n, half = len(features), int(np.around(k1 / 2)) + 1
    full = [reciprocal(ranking, i, k1) for i in range(n)]
    halves = [reciprocal(ranking, i, half) for i in range(n)]
    v = np.zeros((n, n), np.float32)
    for i in range(n):
        own = full[i]
        members = own
        for candidate in own:
            theirs = halves[candidate]
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                members = np.append(members, theirs)
        members = np.unique(members)
        distance = 2 - 2 * torch.mm(features[i].unsqueeze(0), features[members].t())
        v[i, members] = torch.softmax(-distance, dim=1).view(-1).numpy()
    if k2 != 1:
        expanded = np.zeros_like(v)
        for i in range(n):
            expanded[i] = np.mean(v[ranking[i, :k2]], axis=0)
        v = expanded
    holders = [np.where(v[:, i] != 0)[0] for i in range(n)]
    found = np.zeros((n, n), np.float32)
    for i in range(n):
        shared = np.zeros((1, n), np.float32)
        columns = np.where(v[i] != 0)[0]
        for column in columns:
            rows = holders[column]
            shared[0, rows] += np.minimum(v[i, column], v[rows, column])
        found[i] = 1 - shared / (2 - shared)
    found[found < 0] = 0.0
    return found

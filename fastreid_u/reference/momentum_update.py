# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, one sample after the other.

Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, equations 2 and 3 (sequential,
hard); DCCC, ICASSP 2024 (weighted); BMW, NeurIPS 2025 (push); Ge et al., SpCL, NeurIPS 2020 (row).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def momentum_update_(
    memory: Tensor,
    x: Tensor,
    targets: Tensor,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    normalize: bool = True,
    weight_temperature: float | None = None,
    push_weight: float = 0.2,
    index: Tensor | None = None,
    labels: Tensor | None = None,
    cluster_sizes: Tensor | None = None,
    cluster_means: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """``row = l2(momentum * row + (1 - momentum) * sample)`` in place, with the sample or samples that ``rule`` picks.

    Targets of -1 are skipped; nothing happens if ``found_inf`` is not 0. The rules, for a row m, its samples f_i and
    their similarities s_i = <f_i, m> before the batch:

    "sequential", "row": every f_i in batch order, normalising after each. "hard": the f_i with the lowest s_i, the
    first such on ties. "mean": the mean of the f_i. "weighted": sum of softmax(-s_i / weight_temperature) f_i.
    "index": the sample ``index[m]``. "push": with the f_i of "hard" and the most similar other row m' before the batch,
    l2(m - (1 - momentum) (1 - <m, f_i>) (m - f_i) - push_weight (1 + <m, m'>) (m + m')); "push_sequential": the same,
    rows in order of their first sample, m' as it is by then.

    "row" also adds to ``cluster_means[labels[m]]`` what its rows moved, over ``cluster_sizes``.

    In float32, or float64 for a float64 memory; the rows of a half memory are rounded once, when they are stored.
    """
    if found_inf is not None and bool(found_inf.any()):
        return memory
    dtype = torch.promote_types(memory.dtype, torch.float32)
    x = x.to(dtype)
    if normalize:
        x = F.normalize(x, dim=1, eps=1e-12)
    members: dict[int, list[int]] = {}  # the samples of each row, rows by first appearance
    for b, row in enumerate(targets.tolist()):
        if row != -1:
            members.setdefault(row, []).append(b)
    before = memory.clone() if rule == "push" else memory
    for row, samples in members.items():
        old = memory[row].to(dtype, copy=True)
        new = old.clone()
        if rule in ("sequential", "row"):
            for b in samples:
                _move(new, momentum, x[b])
        elif rule == "mean":
            _move(new, momentum, x[samples].mean(dim=0))
        elif rule == "weighted":
            weights = torch.softmax(-(x[samples] @ old) / weight_temperature, dim=0)
            _move(new, momentum, weights @ x[samples])
        elif rule == "index":
            if int(index[row]) in samples:
                _move(new, momentum, x[index[row]])
        elif rule in ("hard", "push", "push_sequential"):
            similarity = x[samples] @ old
            lowest = int(similarity.argmin())  # the first of equals
            hardest = x[samples[lowest]]
            if rule == "hard":
                _move(new, momentum, hardest)
            else:
                step = (1 - momentum) * (1 - similarity[lowest]) * (old - hardest)
                others = before.to(dtype) @ old
                others[row] = -torch.inf
                if len(memory) > 1:
                    step += push_weight * (1 + others.max()) * (old + before[others.argmax()])
                new.sub_(step)
                new.div_(new.norm().clamp(min=1e-12))
        else:
            raise ValueError(f"momentum_update_: rule must be a known rule, got {rule!r}")
        memory[row] = new
        if cluster_means is not None and labels[row] != -1:
            cluster_means[labels[row]] += (memory[row] - old) / cluster_sizes[labels[row]]
    return memory


def _move(row: Tensor, momentum: float, sample: Tensor) -> None:
    row.mul_(momentum).add_(sample, alpha=1 - momentum)
    row.div_(row.norm().clamp(min=1e-12))

# SPDX-License-Identifier: Apache-2.0
"""The steps of an epoch: load, forward, loss, backward (which moves the memory), weights."""

from collections.abc import Sequence

import torch
from torch import nn

from published.images import Sample, batches, train_view
from published.memory import Memory


def optimizer_of(model: nn.Module, lr: float = 3.5e-4, weight_decay: float = 5e-4) -> torch.optim.Adam:
    """Adam with a group for each parameter."""
    groups = [{"params": [p]} for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)


def fit(
    model: nn.Module,
    memory: Memory,
    optimizer: torch.optim.Optimizer,
    labelled: tuple[Sequence[Sample], Sequence[int]],
    numbers: Sequence[Sequence[int]],
    size: tuple[int, int],
    workers: int,
) -> float:
    """One step for each list of image ``numbers``; the mean loss."""
    samples, labels = labelled
    targets = torch.as_tensor(labels)
    model.train()
    losses = []
    for images, _, _, _, which in batches(samples, train_view(*size), workers, numbers):
        loss = memory(model(images), targets[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)

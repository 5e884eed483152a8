# SPDX-License-Identifier: Apache-2.0
"""A row for each cluster: its mean at the start of an epoch, then moved by each sample in turn when losses go back."""

import collections

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def centroids(features: Tensor, labels: list[int]) -> Tensor:
    """(C, D): the mean of the rows of each cluster, of unit length; rows labelled -1 take no part."""
    members = collections.defaultdict(list)
    for row, label in enumerate(labels):
        if label != -1:
            members[label].append(features[row])
    means = [torch.stack(members[label], dim=0).mean(0) for label in sorted(members)]
    return F.normalize(torch.stack(means, dim=0), dim=1)


class _Similarity(torch.autograd.Function):
    """Inner products with the memory. Its backward pass gives the gradient of the inputs and then moves the memory."""

    @staticmethod
    def forward(ctx, inputs: Tensor, targets: Tensor, memory: Tensor, momentum: float) -> Tensor:
        ctx.memory, ctx.momentum = memory, momentum
        ctx.save_for_backward(inputs, targets)
        return inputs.mm(memory.t())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        inputs, targets = ctx.saved_tensors
        for_inputs = gradient.mm(ctx.memory)
        for row, target in zip(inputs, targets.tolist(), strict=True):
            ctx.memory[target] = ctx.momentum * ctx.memory[target] + (1.0 - ctx.momentum) * row
            ctx.memory[target] /= ctx.memory[target].norm()
        return for_inputs, None, None, None


class Memory(nn.Module):
    """Cross-entropy over the similarities to all clusters, over ``temp``."""

    def __init__(self, rows: Tensor, temp: float, momentum: float) -> None:
        super().__init__()
        self.temp, self.momentum = temp, momentum
        self.register_buffer("rows", rows)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs = F.normalize(inputs, dim=1)
        return F.cross_entropy(_Similarity.apply(inputs, targets, self.rows, self.momentum) / self.temp, targets)

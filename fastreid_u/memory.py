# SPDX-License-Identifier: Apache-2.0
"""Memories of prototypes: ``nn.Module`` faces of the ops ``cluster_nce`` and ``momentum_update_``.

All state lives in buffers, so ``state_dict``, ``to`` and checkpoints see it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.ops.momentum_update import momentum_update_


class _UpdateInBackward(torch.autograd.Function):
    """Identity on the loss; the memory absorbs the batch when backward reaches it, as in the published class.

    Backward visits this node before the loss's own, which must still read the old rows: the caller computes the loss
    on a snapshot of the memory.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, x: Tensor, targets: Tensor, memory: "ClusterMemory") -> Tensor:
        ctx.memory = memory
        ctx.save_for_backward(x, targets)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, targets = ctx.saved_tensors
        ctx.memory.update_(x, targets)
        return grad, None, None, None


class ClusterMemory(nn.Module):
    """One unit row per cluster; drop-in for the published class of the same name and signature.

    Args:
        num_features: D, length of a row.
        num_samples: C, number of clusters (the published argument name is kept).
        temp: temperature of the softmax, positive.
        momentum: weight of the OLD row in an update, in [0, 1].
        use_hard: update a row once a step with its least similar sample, instead of with every sample in turn.

    The rows are the buffer ``features`` (C, D) float32; fill it before the first step. ``memory(x, targets)`` returns
    the loss and updates the rows when ``backward`` runs, as published; trainers that may skip a step use
    ``loss = memory.loss(x, targets)`` and, after backward, ``memory.update_(x, targets, found_inf=...)`` instead.
    Both give the same numbers. Source: Dai et al., Cluster Contrast, ACCV 2022.
    """

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        use_hard: bool = False,
    ) -> None:
        super().__init__()
        if not temp > 0:
            raise ValueError(f"ClusterMemory: temp must be positive, got {temp!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"ClusterMemory: momentum must lie in [0, 1], got {momentum!r}")
        self.num_features = num_features
        self.num_samples = num_samples
        self.temp = temp
        self.momentum = momentum
        self.use_hard = use_hard
        self.register_buffer("features", torch.zeros(num_samples, num_features))

    @classmethod
    def from_centroids(cls, centroids: Tensor, **settings) -> "ClusterMemory":
        """A memory that starts at ``centroids`` (C, D), normalised to unit length."""
        memory = cls(centroids.shape[1], centroids.shape[0], **settings).to(centroids.device)
        memory.features.copy_(F.normalize(centroids.float(), dim=1))
        return memory

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Softmax contrastive loss of ``x`` (B, D), normalised inside, against the rows; targets -1 are ignored."""
        return cluster_nce(x, targets, self.features, temperature=self.temp)

    @torch.no_grad()
    def update_(self, x: Tensor, targets: Tensor, *, found_inf: Tensor | None = None) -> None:
        """Move the rows towards the batch, in batch order, in place."""
        rule = "hard" if self.use_hard else "sequential"
        momentum_update_(self.features, x.detach(), targets, momentum=self.momentum, rule=rule, found_inf=found_inf)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.loss(x, targets)
        loss = cluster_nce(x, targets, self.features.clone(), temperature=self.temp)
        return _UpdateInBackward.apply(loss, x.detach(), targets, self)

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, num_samples={self.num_samples}, temp={self.temp}, "
            f"momentum={self.momentum}, use_hard={self.use_hard}"
        )

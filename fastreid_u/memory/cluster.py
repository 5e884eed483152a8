# SPDX-License-Identifier: Apache-2.0
"""One prototype per cluster."""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_bool,
    require_choice,
    require_features,
    require_ids,
    require_in_range,
    require_int_at_least,
    require_same_width,
)
from fastreid_u.memory.one_call import loss_then_update
from fastreid_u.memory.rows import Check, RowMemory, lasting, optional
from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.ops.momentum_update import momentum_update_

RULES = ("sequential", "hard", "mean", "weighted", "index", "push", "push_sequential")


class ClusterMemory(RowMemory):
    """One unit row per cluster; drop-in for the published class of the same name and signature.

    Args:
        num_features: D, length of a row.
        num_samples: C, number of clusters (the published argument name is kept); ``restart`` may change it.
        temp: temperature of the softmax, positive.
        momentum: weight of the OLD row in an update, in [0, 1].
        use_hard: update a row once a step with its least similar sample, instead of with every sample in turn.
        rule: any rule of ``momentum_update_`` but "row"; None for the one that ``use_hard`` chooses.
        weight_temperature: of the rule "weighted" (DCCC).
        push_weight: of the rules "push" and "push_sequential" (BMW).
        normalize: scale the features to unit length first, for loss and update; False uses them as they are.

    The rows are the buffer ``features`` (C, D) float32; ``restart`` fills it, once an epoch. ``memory(x, targets)``
    returns the loss and updates the rows when ``backward`` runs, as published; trainers that may skip a step use
    ``loss = memory.loss(x, targets)`` and, after backward, ``memory.update_(x, targets, found_inf=...)`` instead.
    Both give the same numbers, and both take further settings of ``cluster_nce`` for the loss (teacher, smoothing,
    ...). Source: Dai et al., Cluster Contrast, ACCV 2022.
    """

    SETTINGS: ClassVar[dict[str, Check]] = RowMemory.SETTINGS | {
        "rule": partial(require_choice, choices=RULES),
        "weight_temperature": optional(partial(require_in_range, low=0, high=float("inf"), open_low=True)),
        "normalize": require_bool,
        "push_weight": partial(require_in_range, low=0, high=float("inf"), open_high=True),
    }

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        use_hard: bool = False,
        *,
        rule: str | None = None,
        weight_temperature: float | None = None,
        push_weight: float = 0.2,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.temp = temp
        self.momentum = momentum
        if require_bool("ClusterMemory", "use_hard", use_hard) and rule not in (None, "hard"):
            raise ValueError(f"ClusterMemory: rule must be 'hard' or None with use_hard, got {rule!r}")
        self.rule = ("hard" if use_hard else "sequential") if rule is None else rule
        self.weight_temperature = weight_temperature
        self.push_weight = push_weight
        self.normalize = normalize
        num_samples = require_int_at_least("ClusterMemory", "num_samples", num_samples, 0)
        self.register_buffer("features", torch.zeros(num_samples, num_features, dtype=torch.float32))

    @classmethod
    def from_centroids(cls, centroids: Tensor, **settings) -> "ClusterMemory":
        """A memory that starts at ``centroids`` (C, D), normalised to unit length."""
        centroids = require_features("ClusterMemory.from_centroids", "centroids", centroids)
        with lasting(centroids.device):
            memory = cls(centroids.shape[1], 0, **settings)
        memory.restart(centroids)
        return memory

    @property
    def use_hard(self) -> bool:
        """Whether the rule is "hard"; setting it changes between "hard" and "sequential"."""
        return self.rule == "hard"

    @use_hard.setter
    def use_hard(self, value: bool) -> None:
        value = require_bool("ClusterMemory", "use_hard", value)
        if self.rule in ("sequential", "hard"):
            self.rule = "hard" if value else "sequential"
        elif value:
            raise ValueError(f"ClusterMemory: use_hard must be False with rule={self.rule!r}, got {value!r}")

    @property
    def num_samples(self) -> int:
        """C, number of rows."""
        return len(self.features)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restart(self, centroids: Tensor) -> None:
        """Replace the rows by ``centroids`` (C, D) for any C, normalised to unit length; the settings stay."""
        centroids = require_features("ClusterMemory.restart", "centroids", centroids)
        require_same_width("ClusterMemory.restart", "centroids", centroids, "features", self.features)
        self.features = F.normalize(centroids, dim=1).to(self.features)

    def loss(self, x: Tensor, targets: Tensor, **settings) -> Tensor:
        """Softmax contrastive loss of ``x`` (B, D) against the rows; targets -1 are ignored.

        ``settings`` are further ones of ``cluster_nce``, as ``smoothing``, or others than the memory's.
        """
        settings = {"temperature": self.temp, "normalize": self.normalize, **settings}
        return cluster_nce(x, targets, self.features, **settings)

    @torch.no_grad()
    def update_(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        normalize: bool | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Move the rows towards the batch, in place.

        Args:
            x: (B, D) the features of the loss. targets: (B,) their rows; -1 for none. Of several ranks, each must give
                the batch of all of them, ``memory.update_(*gather_in_rank_order(x, targets))``.
            index: of the rule "index": (C,) the sample of ``x`` that moves each row, -1 for none.
            normalize: other than the memory's.
            found_inf: one number as a gradient scaler keeps it, the same on all ranks; nothing moves unless it is 0.
        """
        x, targets = _batch(x, targets)
        momentum_update_(
            self.features, x, targets, momentum=self.momentum, rule=self.rule, index=index, found_inf=found_inf,
            weight_temperature=self.weight_temperature, push_weight=self.push_weight,
            normalize=self.normalize if normalize is None else normalize,
        )  # fmt: skip

    def forward(self, x: Tensor, targets: Tensor, **settings) -> Tensor:
        return loss_then_update(self, self._batch_of_one_call, x, targets, **settings)

    def _batch_of_one_call(self, x: object, targets: object) -> tuple[Tensor, Tensor]:
        if self.rule == "index":
            raise ValueError(
                "ClusterMemory: rule must not be 'index' in one call; use loss(...) and update_(..., index)"
            )
        return _batch(x, targets)

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, num_samples={self.num_samples}, temp={self.temp}, "
            f"momentum={self.momentum}, rule={self.rule!r}"
        )


def _batch(x: object, targets: object) -> tuple[Tensor, Tensor]:
    return as_tensor("ClusterMemory", "x", x), require_ids("ClusterMemory", "targets", targets)

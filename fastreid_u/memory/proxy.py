# SPDX-License-Identifier: Apache-2.0
"""One prototype per cluster and camera."""

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
    require_positive_int,
    require_same_device,
    require_same_length,
    require_same_width,
    require_values_in,
)
from fastreid_u.memory.one_call import loss_then_update
from fastreid_u.memory.rows import Check, RowMemory, lasting, optional
from fastreid_u.ops.centroids import proxy_centroids
from fastreid_u.ops.momentum_update import momentum_update_
from fastreid_u.ops.proxy_nce import proxy_nce


class ProxyMemory(RowMemory):
    """CAP's memory: one unit row for what each camera has seen of each cluster.

    Args:
        num_features: D, length of a row.
        num_proxies: Q, pairs of a cluster and a camera that has seen it; ``restart`` may change it.
        temp: temperature of the softmax, positive.
        momentum: weight of the OLD row in an update, in [0, 1]; 1 keeps the rows as they are (ICE, PPLR).
        intra_weight: factor of the loss within cameras: each sample among the proxies of its camera.
        inter_weight: factor of the loss between cameras: towards all proxies of its cluster, away from the
            ``hard_negatives`` nearest others. CAP keeps it at 0 for five epochs; the attribute may be changed.
        hard_negatives, positives, reduction, compat: of ``proxy_nce``. CAP as published is reduction="camera".

    Buffers: ``features`` (Q, D) float32, ``clusters`` and ``cameras`` (Q,) int64, rows ascending by (camera, cluster).
    ``restart`` fills them, once an epoch. Targets are rows, ``memory.rows(labels, cameras)``; a sampler that deals
    out proxies takes the same numbers. ``memory(x, targets)`` returns the loss and updates the rows when backward runs,
    or use ``memory.loss(x, targets)`` and, after backward, ``memory.update_(x, targets)``.
    Source: Wang et al., CAP, AAAI 2021.
    """

    PER_ROW = ("features", "clusters", "cameras")
    SETTINGS: ClassVar[dict[str, Check]] = RowMemory.SETTINGS | {
        "compat": require_bool,
        "intra_weight": partial(require_in_range, low=0, high=float("inf"), open_high=True),
        "inter_weight": partial(require_in_range, low=0, high=float("inf"), open_high=True),
        "hard_negatives": optional(require_positive_int),
        "positives": partial(require_choice, choices=("all", "other_cameras")),
        "reduction": partial(require_choice, choices=("mean", "camera", "sum", "none")),
    }

    def __init__(
        self,
        num_features: int,
        num_proxies: int,
        temp: float = 0.07,
        momentum: float = 0.2,
        *,
        intra_weight: float = 1.0,
        inter_weight: float = 0.5,
        hard_negatives: int | None = 50,
        positives: str = "all",
        reduction: str = "mean",
        compat: bool = False,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.temp = temp
        self.momentum = momentum
        self.intra_weight = intra_weight
        self.inter_weight = inter_weight
        self.hard_negatives = hard_negatives
        self.positives = positives
        self.reduction = reduction
        self.compat = compat
        num_proxies = require_int_at_least("ProxyMemory", "num_proxies", num_proxies, 0)
        self.register_buffer("features", torch.zeros(num_proxies, num_features, dtype=torch.float32))
        self.register_buffer("clusters", torch.zeros(num_proxies, dtype=torch.int64))
        self.register_buffer("cameras", torch.zeros(num_proxies, dtype=torch.int64))

    @classmethod
    @torch.inference_mode(False)
    def from_features(cls, features: Tensor, labels: Tensor, cameras: Tensor, **settings) -> "ProxyMemory":
        """Rows that start at the means of the unit features (N, D) with one label (N,) and camera (N,), scaled to 1.

        Labels and cameras are integers from 0, with gaps or without; images labelled -1 take no part.
        """
        rows, clusters, cameras = _proxies("ProxyMemory.from_features", features, labels, cameras)
        with lasting(rows.device):
            memory = cls(rows.shape[1], 0, **settings)
        memory._take(rows, clusters, cameras)
        return memory

    @property
    def num_proxies(self) -> int:
        """Q, number of rows."""
        return len(self.features)

    @torch.inference_mode(False)
    def restart(self, features: Tensor, labels: Tensor, cameras: Tensor) -> None:
        """Replace the rows, as many as there are now, by those of ``from_features``; the settings stay."""
        proxies = _proxies("ProxyMemory.restart", features, labels, cameras)
        require_same_width("ProxyMemory.restart", "features", proxies[0], "the memory", self.features)
        self._take(*proxies)

    def _take(self, rows: Tensor, clusters: Tensor, cameras: Tensor) -> None:
        # all at once, as an assignment to one takes as many rows as there are
        self._buffers.update(
            features=rows.to(self.features), clusters=clusters.to(self.clusters), cameras=cameras.to(self.cameras)
        )

    def _rows(self, name: str, value: object) -> Tensor:
        rows = super()._rows(name, value)
        if len(rows) != self.num_proxies:
            raise ValueError(
                f"ProxyMemory: {name} must have {self.num_proxies} rows, a proxy each, got {len(rows)}; restart(...) "
                "takes any number"
            )
        return rows

    def _require_values(self, op: str, name: str, value: Tensor) -> None:
        super()._require_values(op, name, value)
        if name in ("clusters", "cameras"):
            require_values_in(op, name, value, 0, 2**31, always=True)

    def rows(self, labels: Tensor, cameras: Tensor) -> Tensor:
        """The row of each image (N,) int64 by its label and camera; -1 where there is none. Reads nothing back."""
        op = "ProxyMemory.rows"
        labels, cameras = (
            require_ids(op, name, ids).to(self.cameras) for name, ids in (("labels", labels), ("cameras", cameras))
        )
        require_same_length(op, "cameras", cameras, "labels", labels)
        if self.num_proxies == 0:
            return torch.full_like(labels, -1)
        # ascending as the rows are, unless others were assigned
        known, order = ((self.cameras << 32) + self.clusters).sort(stable=True)
        wanted = (cameras << 32) + labels
        place = torch.searchsorted(known, wanted).clamp(max=self.num_proxies - 1)
        return torch.where((known[place] == wanted) & (labels >= 0), order[place], -1)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """``intra_weight`` times the loss of ``x`` (B, D) within cameras, plus ``inter_weight`` times that between.

        ``targets`` (B,) are rows; -1 is ignored.
        """
        if self.num_proxies == 0:
            raise ValueError("ProxyMemory: features must have at least one row before the first loss, got no proxy")
        x, targets = _batch(x, targets)
        require_same_device("ProxyMemory", "targets", targets, "features", self.features)
        require_values_in("ProxyMemory", "targets", targets, 0, self.num_proxies, ignore=-1)
        row = targets.clamp(0, self.num_proxies - 1)  # out of range on a GPU: update_ will flag it
        clusters = torch.where(targets >= 0, self.clusters[row], -1)
        arguments = (x, clusters, self.cameras[row], self.features, self.clusters, self.cameras)
        settings = {"temperature": self.temp, "reduction": self.reduction, "compat": self.compat}
        terms = []
        if self.intra_weight > 0:
            terms.append(self.intra_weight * proxy_nce(*arguments, scope="camera", **settings))
        if self.inter_weight > 0:
            settings |= {"hard_negatives": self.hard_negatives, "positives": self.positives}
            terms.append(self.inter_weight * proxy_nce(*arguments, **settings))
        return sum(terms) if terms else x[:0].sum()

    @torch.no_grad()
    def update_(self, x: Tensor, targets: Tensor, *, found_inf: Tensor | None = None) -> None:
        """Move row ``targets[b]`` towards ``x[b]``, in batch order, in place.

        Of several ranks, each must give the batch of all of them, ``update_(*gather_in_rank_order(x, targets))``.
        ``found_inf``: one number as a gradient scaler keeps it, the same on all ranks; nothing moves unless it is 0.
        """
        x, targets = _batch(x, targets)
        momentum_update_(self.features, x, targets, momentum=self.momentum, found_inf=found_inf)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return loss_then_update(self, _batch, x, targets)

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, num_proxies={self.num_proxies}, temp={self.temp}, "
            f"momentum={self.momentum}, intra_weight={self.intra_weight}, inter_weight={self.inter_weight}"
        )


def _proxies(op: str, features: object, labels: object, cameras: object) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (Q, D) of unit length, their clusters (Q,) and their cameras (Q,)."""
    features = F.normalize(require_features(op, "features", features), dim=1)
    labels, cameras = (
        require_same_length(op, name, require_ids(op, name, ids), "features", features)
        for name, ids in (("labels", labels), ("cameras", cameras))
    )
    for name, ids, outlier in (("labels", labels, -1), ("cameras", cameras, None)):
        require_values_in(op, name, ids, 0, 2**31, ignore=outlier, always=True)
    return proxy_centroids(features, labels.to(features.device), cameras.to(features.device))


def _batch(x: object, targets: object) -> tuple[Tensor, Tensor]:
    return as_tensor("ProxyMemory", "x", x), require_ids("ProxyMemory", "targets", targets)

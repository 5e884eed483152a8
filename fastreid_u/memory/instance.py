# SPDX-License-Identifier: Apache-2.0
"""One row per image, compared with through the means of their clusters."""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_bool,
    require_features,
    require_ids,
    require_in_range,
    require_int_at_least,
    require_same_device,
    require_same_length,
    require_same_width,
    require_values_in,
)
from fastreid_u._label_checks import label_limit
from fastreid_u.memory.one_call import loss_then_update
from fastreid_u.memory.rows import Check, RowMemory, lasting
from fastreid_u.ops.centroids import cluster_centroids
from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.ops.momentum_update import momentum_update_


class InstanceMemory(RowMemory):
    """SpCL's hybrid memory: a unit row per image, or before them one per labelled source class; labels per epoch.

    Args:
        num_features: D, length of a row.
        num_samples: N, number of rows, source classes included.
        temp: temperature of the softmax, positive.
        momentum: weight of the OLD row in an update, in [0, 1].
        num_source_classes: S, rows 0 .. S - 1 that stand for classes of labelled source data (domain adaptation); each
            is a cluster of its own. Image i of the target data is row S + i.
        epsilon: in the softmax and in the logarithm, as in the published loss; see ``cluster_nce``.
        normalize: scale the features to unit length first; False uses them as they are, as the published class.

    Buffers: ``features`` (N, D) float32 and ``labels`` (N,) int64; from them ``cluster_means`` (K, D), not unit rows,
    and ``cluster_sizes`` (K,), which ``set_labels`` makes and updates keep. All but the sizes are in ``state_dict``:
    means that were updated differ in their last bits from means made anew.
    Memory: 4 (N + K) D bytes; a step reads K D numbers, never N D.

    Once an epoch ``memory.set_labels(labels)``, or as published ``memory.labels = labels``, (N,) of all rows; then
    ``memory(x, rows)`` returns the loss and updates the rows when backward runs, as published, or
    ``memory.loss(x, rows)`` and, after backward, ``memory.update_(x, rows)``. Where ``memory.features`` is set the
    clusters are made anew as well; what is written into a buffer they do not see. Labels need not be dense: those
    without rows take no part. Several losses in one backward all see the old rows (the published class lets the later
    one change the rows before the gradient of the earlier).
    Sources: Ge et al., SpCL, NeurIPS 2020; with ``focal=4`` for the loss CACL, IEEE TIP 2022.
    """

    PER_ROW = ("features", "labels")
    SETTINGS: ClassVar[dict[str, Check]] = RowMemory.SETTINGS | {
        "num_source_classes": partial(require_int_at_least, low=0),
        "normalize": require_bool,
        "epsilon": partial(require_in_range, low=0, high=1, open_high=True),
    }

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        *,
        num_source_classes: int = 0,
        epsilon: float = 1e-6,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.temp = temp
        self.momentum = momentum
        self.num_source_classes = num_source_classes
        self.epsilon = epsilon
        self.normalize = normalize
        num_samples = require_int_at_least("InstanceMemory", "num_samples", num_samples, 0)
        self.register_buffer("features", torch.zeros(num_samples, num_features, dtype=torch.float32))
        self.register_buffer("labels", torch.full((num_samples,), -1))
        self.register_buffer("cluster_means", self.features[:0].clone())
        self.register_buffer("cluster_sizes", torch.zeros(0, dtype=torch.int64), persistent=False)

    @property
    def num_samples(self) -> int:
        """N, number of rows."""
        return len(self.features)

    @classmethod
    def from_features(cls, features: Tensor, *, source_centroids: Tensor | None = None, **settings) -> "InstanceMemory":
        """A memory that starts at ``features`` (N, D), below ``source_centroids`` (S, D), all scaled to unit length."""
        op = "InstanceMemory.from_features"
        rows, settings["num_source_classes"] = require_features(op, "features", features), 0
        if source_centroids is not None:
            sources = require_features(op, "source_centroids", source_centroids)
            require_same_width(op, "source_centroids", sources, "features", rows)
            require_same_device(op, "source_centroids", sources, "features", rows)
            rows, settings["num_source_classes"] = torch.cat([sources, rows]), len(sources)
        with lasting(rows.device):
            memory = cls(rows.shape[1], rows.shape[0], **settings)
        memory.features.copy_(F.normalize(rows, dim=1))
        return memory

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_labels(self, labels: Tensor) -> None:
        """The clusters of an epoch: ``labels`` (N - S,) integers from 0, one per image; -1 takes the image out.

        Outliers that SpCL keeps are clusters of one. The numbers are shifted by S here: source classes come first.
        """
        op, s = "InstanceMemory.set_labels", self.num_source_classes
        labels = require_ids(op, "labels", labels)
        require_same_length(op, "labels", labels, "the images' rows", self.features[s:])
        require_values_in(op, "labels", labels, 0, label_limit(len(labels)), ignore=-1, always=True)
        labels = labels.to(self.labels)
        self.labels = torch.cat([torch.arange(s, device=labels.device), torch.where(labels >= 0, labels + s, -1)])

    def __setattr__(self, name: str, value: object) -> None:
        """The clusters follow the rows and labels that published code sets by assignment."""
        super().__setattr__(name, value)
        if name in self.PER_ROW and "cluster_sizes" in self._buffers:
            self._gather_clusters()

    def _require_values(self, op: str, name: str, value: Tensor) -> None:
        super()._require_values(op, name, value)
        if name == "labels":
            require_values_in(op, name, value, 0, label_limit(len(value)), ignore=-1, always=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _gather_clusters(self) -> None:
        if len(self.labels) != len(self.features):  # labels of other rows: there are no clusters until they are set
            self.labels = self.labels.new_full((len(self.features),), -1)
            return
        self._count_clusters()
        means = cluster_centroids(self.features, self.labels, normalize=False)
        self.cluster_means = means.to(self.features.dtype)

    def _count_clusters(self) -> None:
        self.cluster_sizes = torch.bincount(self.labels[self.labels >= 0])

    def _misfits(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
        wrong = super()._misfits(pairs)
        if not wrong and {"labels", "cluster_means"} <= pairs.keys():
            means, labels = pairs["cluster_means"][1], pairs["labels"][1]
            clusters = max(int(labels.max()) + 1, 0) if len(labels) else 0
            if len(means) != clusters:
                wrong.append(f"cluster_means must have a row for each of {clusters} labels, got {len(means)}")
        return wrong

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        faults = len(errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if len(errors) > faults:
            return
        if prefix + "cluster_means" in missing:  # as earlier run folders hold it
            missing.remove(prefix + "cluster_means")
            self._gather_clusters()
        self._count_clusters()

    def loss(self, x: Tensor, rows: Tensor, **settings) -> Tensor:
        """Loss of ``x`` (B, D) against the cluster means, each towards the cluster of its row (B,); -1 is ignored.

        ``settings`` are further ones of ``cluster_nce``, as ``focal``, or others than the memory's.
        """
        if len(self.cluster_means) == 0:
            raise ValueError("InstanceMemory: labels must be set before the first loss, got no cluster")
        x, rows = _batch(x, rows)
        require_same_device("InstanceMemory", "rows", rows, "features", self.features)
        require_values_in("InstanceMemory", "rows", rows, 0, self.num_samples, ignore=-1)
        clusters = self.labels[rows.clamp(0, self.num_samples - 1)]  # out of range on a GPU: update_ will flag it
        settings = {
            "temperature": self.temp, "normalize": self.normalize, "class_mask": self.cluster_sizes > 0,
            "epsilon": self.epsilon, **settings,
        }  # fmt: skip
        return cluster_nce(x, torch.where(rows >= 0, clusters, -1), self.cluster_means, **settings)

    @torch.no_grad()
    def update_(
        self, x: Tensor, rows: Tensor, *, normalize: bool | None = None, found_inf: Tensor | None = None
    ) -> None:
        """Move row ``rows[b]`` towards ``x[b]``, in batch order, in place.

        Of several ranks, each must give the batch of all of them, ``update_(*gather_in_rank_order(x, rows))``.
        ``normalize``: other than the memory's. ``found_inf``: one number as a gradient scaler keeps it, the same on all
        ranks; nothing moves unless it is 0.
        """
        clusters = {} if len(self.cluster_means) == 0 else {
            "labels": self.labels, "cluster_sizes": self.cluster_sizes, "cluster_means": self.cluster_means,
        }  # fmt: skip
        x, rows = _batch(x, rows)
        momentum_update_(
            self.features, x, rows, momentum=self.momentum, rule="row", found_inf=found_inf,
            normalize=self.normalize if normalize is None else normalize, **clusters,
        )  # fmt: skip

    def forward(self, x: Tensor, rows: Tensor, **settings) -> Tensor:
        return loss_then_update(self, _batch, x, rows, **settings)

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, num_samples={self.num_samples}, temp={self.temp}, "
            f"momentum={self.momentum}, num_source_classes={self.num_source_classes}"
        )


def _batch(x: object, rows: object) -> tuple[Tensor, Tensor]:
    return as_tensor("InstanceMemory", "x", x), require_ids("InstanceMemory", "rows", rows)

# SPDX-License-Identifier: Apache-2.0
"""CAP with Cluster Contrast: beside the memory of clusters one that is split by camera.

The appendix of Cluster Contrast (Dai et al., ACCV 2022, arXiv 2103.11568) names the combination in a sentence and gives
its results; no code was published. This is our reading: Cluster Contrast's recipe and loss, plus CAP's loss between
cameras. ``cap_cluster_contrast_proxy`` is the more literal one, without the memory of clusters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastreid_u.config import IN_UNIT, NOT_NEGATIVE, POSITIVE, at_least, option
from fastreid_u.memory import ProxyMemory
from fastreid_u.methods.cluster_contrast import ClusterContrast, ClusterContrastConfig
from fastreid_u.recipe import Batch

CAP_CODE = "CAP, published code (4a04fef)"


@dataclass(frozen=True, kw_only=True)
class CAPClusterContrastConfig(ClusterContrastConfig):
    """Cluster Contrast's settings, and those of the proxies."""

    cluster_weight: float = option(1.0, "factor of the loss over clusters", rule=NOT_NEGATIVE)
    intra_weight: float = option(
        0.0, "factor of the loss within cameras, which clusters already teach (ICE's authors)", rule=NOT_NEGATIVE
    )
    inter_weight: float = option(0.5, "factor of the loss between cameras", source=CAP_CODE, rule=NOT_NEGATIVE)
    inter_start: int = option(
        5, "first epoch, from 0, with the loss between cameras", source=CAP_CODE, rule=NOT_NEGATIVE
    )
    hard_negatives: int = option(
        50, "proxies of other clusters in the loss between cameras", source=CAP_CODE, rule=at_least(1)
    )
    proxy_temp: float = option(0.07, "temperature of the softmax over proxies", source=CAP_CODE, rule=POSITIVE)
    proxy_momentum: float = option(0.2, "weight of the old proxy in an update", source=CAP_CODE, rule=IN_UNIT)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **ClusterContrastConfig.PER_DATASET,
        "synthetic": {
            **ClusterContrastConfig.PER_DATASET["synthetic"],
            "proxy_temp": 0.1,
            "proxy_momentum": 0.8,
            "inter_start": 2,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster_weight + self.intra_weight == 0:
            raise ValueError(
                f"config: cluster_weight must be positive where intra_weight is 0, got {self.cluster_weight!r}"
            )


class CAPClusterContrast(ClusterContrast):
    name = "cap_cluster_contrast"
    title = "CAP + Cluster Contrast"
    Config = CAPClusterContrastConfig
    published = False
    has_compat = True
    needs_cameras = True

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> None:
        c = self.config
        if c.cluster_weight > 0:
            super().begin_epoch(features, labels, epoch)
        kept = labels >= 0
        self.proxies = ProxyMemory.from_features(
            features[kept],
            labels[kept],
            self.images.camids.to(labels.device)[kept],
            temp=c.proxy_temp,
            momentum=c.proxy_momentum,
            intra_weight=c.intra_weight,
            inter_weight=c.inter_weight if epoch >= c.inter_start else 0.0,
            hard_negatives=c.hard_negatives,
            reduction="camera" if c.compat else "mean",
            compat=c.compat,
        )

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        loss = self.proxies.loss(x, self.proxies.rows(batch.targets, batch.camids))
        if self.config.cluster_weight > 0:
            loss = loss + self.config.cluster_weight * super().loss(x, batch)
        return loss

    def update(self, x: Tensor, batch: Batch) -> None:
        if self.config.cluster_weight > 0:
            super().update(x, batch)
        self.proxies.update_(x, self.proxies.rows(batch.targets, batch.camids))

# SPDX-License-Identifier: Apache-2.0
"""CAP with Cluster Contrast: beside the memory of clusters one that is split by camera.

The appendix of Cluster Contrast (Dai et al., ACCV 2022, arXiv 2103.11568) names the combination in a sentence and gives
its results; no code was published. This is our reading: Cluster Contrast's recipe and loss, plus CAP's loss between
cameras. ``cap_cluster_contrast_proxy`` is the more literal one, without the memory of clusters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastreid_u.config import IN_UNIT, NOT_NEGATIVE, POSITIVE, at_least, option
from fastreid_u.memory import ProxyMemory
from fastreid_u.recipe import Batch, Images, Paper
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig

if TYPE_CHECKING:
    from fastreid_u.models import ReIDModel

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
    paper = Paper("CAP + Cluster Contrast", published=False, compat=True)
    Config = CAPClusterContrastConfig

    def __init__(self, config: CAPClusterContrastConfig, images: Images) -> None:
        super().__init__(config, images)
        images.require_cameras(self.name)

    def build(self, model: "ReIDModel") -> None:
        super().build(model)
        c = self.config
        self.proxies = ProxyMemory(
            model.num_features, 0, c.proxy_temp, c.proxy_momentum, intra_weight=c.intra_weight,
            hard_negatives=c.hard_negatives, reduction="camera" if c.compat else "mean", compat=c.compat,
        )  # fmt: skip

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        kept = labels >= 0
        self.proxies.restart(features[kept], labels[kept], self.images.camids.to(labels.device)[kept])
        return super().begin_epoch(features, labels, epoch) if self.config.cluster_weight > 0 else labels

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        c = self.config
        self.proxies.inter_weight = c.inter_weight if batch.epoch >= c.inter_start else 0.0
        loss = self.proxies.loss(outputs, self.proxies.rows(batch.targets, batch.camids))
        if c.cluster_weight > 0:
            loss = loss + c.cluster_weight * super().loss(outputs, batch)
        return loss

    def update(self, outputs: Tensor, batch: Batch) -> None:
        if self.config.cluster_weight > 0:
            super().update(outputs, batch)
        self.proxies.update_(outputs, self.proxies.rows(batch.targets, batch.camids))

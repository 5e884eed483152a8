# SPDX-License-Identifier: Apache-2.0
"""SpCL + Cluster Contrast: a labelled source and an unlabelled target in one memory with a row per class.

Described in words in the appendix of Cluster Contrast (arXiv 2103.11568 v3): SpCL's domain-adaptive setting with
cluster-level rows in place of its hybrid memory. No code was released; what the words leave open is an option here,
and docs/methods/cluster_contrast_uda.md lists which choice is whose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastreid_u.config import IN_UNIT, changed, option
from fastreid_u.labels.self_paced import SelfPacedLabels
from fastreid_u.ops.centroids import cluster_centroids
from fastreid_u.ops.label_classes import own_classes
from fastreid_u.recipe import Batch, Extract, Images, Paper
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig
from fastreid_u.recipes.spcl import PAPER as SPCL
from fastreid_u.recipes.spcl import require_paces
from fastreid_u.recipes.spcl_uda import TwoDomains

APPENDIX = "Cluster Contrast, appendix"
SUPER_STRONG = "OpenUnReID's super-strong baseline has the other choice"
LONG = {"iters": 800}
VEHICLES = {"height": 224, "width": 224, **LONG}


@dataclass(frozen=True, kw_only=True)
class ClusterContrastUDAConfig(ClusterContrastConfig):
    """As ``cluster_contrast``; a step takes ``batch_size`` images of each domain, and source rows outlive epochs."""

    source: str | None = option(None, "labelled set to learn from as well: a name, folder or CSV", source=APPENDIX)
    source_refresh: str = option(
        "persist",
        "source rows: made once and moved by their images, or made anew every_epoch",
        source=SPCL + "; " + SUPER_STRONG,
        choices=("persist", "every_epoch"),
    )
    reliability: bool = option(False, "choose clusters by SpCL's criterion; the rest is un-clustered")
    eps_gap: float = option(0.02, "with reliability: clusterings compared with are at eps -+ this", source=SPCL)
    keep: float = option(0.9, "with reliability: share of first clusters to set the bar", source=SPCL, rule=IN_UNIT)
    unclustered: str = option(
        "drop",
        "un-clustered target images: sit the epoch out, or have a row each",
        source="drop: Cluster Contrast; row: SpCL",
        choices=("drop", "row"),
    )
    softmax: str = option(
        "plain",
        "plain cross-entropy, or with SpCL's 1e-6 in softmax and logarithm",
        source="plain: Cluster Contrast; epsilon: SpCL",
        choices=("plain", "epsilon"),
    )
    epochs = changed(50, source=SPCL)
    iters = changed(400, source=SPCL)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "msmt17": LONG,
        "veri": VEHICLES,
        "vehicleid": VEHICLES,
        "synthetic": {**ClusterContrastConfig.PER_DATASET["synthetic"], "source": "synthetic"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reliability:
            require_paces(self)


class ClusterContrastUDA(TwoDomains, ClusterContrast):
    """Rows 0 .. P - 1 of the memory are source identities, then come target clusters, then single target images."""

    name = "cluster_contrast_uda"
    paper = Paper("SpCL + Cluster Contrast, domain adaptive", published=False, compat=True)
    Config = ClusterContrastUDAConfig

    def __init__(self, config: ClusterContrastUDAConfig, images: Images) -> None:
        super().__init__(config, images)
        if config.reliability:
            self.labels = SelfPacedLabels(config, images)

    def features(self, extract: Extract, epoch: int) -> Tensor:
        self.source_rows = self.memory.features[: self.people]  # as their images have moved them
        if epoch == 0 or self.config.source_refresh == "every_epoch":
            bn = "target" if self.config.compat else "source"  # OpenUnReID extracts with the target's statistics
            self.source_rows = self.source_centroids(extract, bn)
        return extract(self.model)

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        if self.config.unclustered == "row":
            labels = own_classes(labels, self.images.readable.to(labels.device))
        kept = labels >= 0
        self.memory.restart(torch.cat([self.source_rows, cluster_centroids(features[kept], labels[kept])]))
        del self.source_rows
        return labels

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        own, labelled = outputs
        epsilon = 1e-6 if self.config.softmax == "epsilon" else 0.0
        return self.memory.loss(own, batch.targets + self.people, epsilon=epsilon) + self.memory.loss(
            labelled, batch.source.targets, epsilon=epsilon
        )

    def update(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> None:
        own, labelled = outputs
        self.memory.update_(labelled, batch.source.targets)
        self.memory.update_(own, batch.targets + self.people)

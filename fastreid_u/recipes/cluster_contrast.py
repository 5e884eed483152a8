# SPDX-License-Identifier: Apache-2.0
"""Cluster Contrast: a memory with one row per cluster, rebuilt each epoch, updated by the batch's own features.

Dai, Wang, Yuan, Zhu, Tan: Cluster Contrast for Unsupervised Person Re-Identification, ACCV 2022 (arXiv 2103.11568).
What it adds to the family: loss and update are those of clusters, whose members are thus equally far in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fastreid_u.config import IN_UNIT, POSITIVE, RENDERED, Config, changed, option
from fastreid_u.memory import ClusterMemory
from fastreid_u.ops.centroids import cluster_centroids
from fastreid_u.recipe import Batch, Paper, Recipe

PAPER, COMMANDS = "Cluster Contrast, arXiv 2103.11568 v3", "published training commands (57b62e9)"


@dataclass(frozen=True, kw_only=True)
class ClusterContrastConfig(Config):
    """Defaults are those of the published commands, on ResNet-50 with 4 GPUs emulated by ``bn_group``."""

    temp: float = option(0.05, "temperature of the softmax over clusters", source=PAPER, rule=POSITIVE)
    momentum: float = option(0.1, "weight of the old memory row in an update", source=COMMANDS, rule=IN_UNIT)
    use_hard: bool = option(False, "update a row with its least similar sample only", source=PAPER + " (v1 default)")
    pooling_type = changed("gem", "spatial pooling; the paper has avg, commands gem", source="published code (57b62e9)")
    bn_group = changed(64, source="256 images on 4 GPUs")
    epochs = changed(50, source=COMMANDS)
    batch_size = changed(256, source=COMMANDS)
    num_instances = changed(16, source=COMMANDS)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{name: {"iters": 200} for name in ("market1501", "dukemtmcreid")},
        **{name: {"height": 224, "width": 224} for name in ("veri", "vehicleid")},
        "synthetic": {**RENDERED, "temp": 0.1, "momentum": 0.8},
    }


class ClusterContrast(Recipe):
    name = "cluster_contrast"
    paper = Paper("Cluster Contrast")
    Config = ClusterContrastConfig

    def build(self, model: nn.Module) -> None:
        super().build(model)
        self.memory = ClusterMemory(model.num_features, 0, self.config.temp, self.config.momentum, self.config.use_hard)

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        kept = labels >= 0
        self.memory.restart(cluster_centroids(features[kept], labels[kept]))
        return labels

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.memory.loss(outputs, batch.targets)

    def update(self, outputs: Tensor, batch: Batch) -> None:
        self.memory.update_(outputs, batch.targets)

# SPDX-License-Identifier: Apache-2.0
"""ICE: beside clusters and cameras, the images of a batch teach each other, through an averaged network.

Chen, Lagadec, Bremond: ICE: Inter-instance Contrastive Encoding for Unsupervised Person Re-identification, ICCV 2021
(arXiv 2103.16364). What it adds to the family: pseudo-labels say what is alike, not how alike. A sample is pulled to
the hardest of its cluster in the batch, and a distorted view has to relate to the batch as the teacher, an average of
the network over its steps, relates plain ones.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u.config import IN_UNIT, NOT_NEGATIVE, POSITIVE, RENDERED, Config, at_least, changed, option
from fastreid_u.draws import Draws
from fastreid_u.memory import ProxyMemory
from fastreid_u.ops.centroids import cluster_centroids
from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.ops.consistency_kl import consistency_kl
from fastreid_u.ops.ema_update import ema_update_
from fastreid_u.ops.hard_instance_nce import hard_instance_nce
from fastreid_u.recipe import Batch, Extract, Images, Paper, Recipe

if TYPE_CHECKING:
    from fastreid_u.data import View
    from fastreid_u.models import ReIDModel

CODE = "published code (a206eb9)"


@dataclass(frozen=True, kw_only=True)
class ICEConfig(Config):
    """Defaults are those of the published code, on 4 GPUs emulated by ``bn_group``."""

    temp: float = option(0.5, "temperature over clusters, of features not scaled to 1", source=CODE, rule=POSITIVE)
    smoothing: float = option(0.1, "share of the target spread over all clusters", source=CODE, rule=IN_UNIT)
    hard_weight: float = option(1.0, "factor of the loss to the hardest of the cluster", source=CODE, rule=NOT_NEGATIVE)
    hard_temp: float = option(0.1, "its temperature", source=CODE, rule=POSITIVE)
    soft_weight: float = option(10.0, "factor of the divergence between the views", source=CODE, rule=NOT_NEGATIVE)
    soft_temp: float = option(0.4, "its temperature", source=CODE, rule=POSITIVE)
    camera_weight: float = option(0.5, "factor of the loss between cameras; 0 = none", source=CODE, rule=NOT_NEGATIVE)
    camera_temp: float = option(0.07, "its temperature", source=CODE, rule=POSITIVE)
    hard_negatives: int = option(50, "negative proxies in the loss between cameras", source=CODE, rule=at_least(1))
    alpha: float = option(0.999, "weight of the old teacher after a step", source=CODE, rule=IN_UNIT)
    blur: float = option(0.5, "probability of a Gaussian blur in the strong views", source=CODE, rule=IN_UNIT)
    erase = changed(0.6, "probability of random erasing in the strong views", source=CODE)
    eps = changed(0.55, source=CODE)
    bn_group = changed(8, source="32 images on 4 GPUs")
    batch_size = changed(32, source=CODE)
    num_instances = changed(4, source=CODE)
    epochs = changed(40, source=CODE)
    step_size = changed(0, source=CODE)
    warmup_epochs = changed(10, source=CODE)
    warmup_factor = changed(0.1, source=CODE)
    eval_step = changed(1, source=CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 540 steps in all: a teacher that takes a thousand to follow would never arrive
        "synthetic": {**RENDERED, "alpha": 0.9, "blur": 0.0, "warmup_epochs": 0},
    }


class ICE(Recipe):
    """``teacher`` is the average of the network over the steps so far: it is clustered, ranked and saved."""

    name = "ice"
    paper = Paper("ICE", compat=True)
    Config = ICEConfig

    def __init__(self, config: ICEConfig, images: Images) -> None:
        super().__init__(config, images)
        if config.camera_weight > 0:
            images.require_cameras(self.name, unless="camera_weight=0")

    def build(self, model: "ReIDModel") -> None:
        """Beside the networks the means of the clusters, and one proxy per cluster and camera: fixed for an epoch."""
        super().build(model)
        c = self.config
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.shuffler = Draws()
        self.register_buffer("centres", torch.zeros(0, model.num_features))
        self.proxies = ProxyMemory(
            model.num_features, 0, c.camera_temp, intra_weight=0.0, inter_weight=c.camera_weight,
            hard_negatives=c.hard_negatives, reduction="camera", compat=c.compat,
        ) if c.camera_weight > 0 else None  # fmt: skip

    def ranked(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher}

    def views(self) -> "tuple[View, ...]":
        from fastreid_u.data import test_transform, train_transform

        c = self.config
        strong = train_transform(
            c.height, c.width, erase=c.erase, blur=c.blur, color_jitter=c.color_jitter, pixel_norm=c.pixel_norm
        )
        return strong, strong, test_transform(c.height, c.width, pixel_norm=c.pixel_norm)

    def features(self, extract: Extract, epoch: int) -> Tensor:
        return extract(self.teacher)

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        kept = labels >= 0
        self.centres = cluster_centroids(features[kept], labels[kept], normalize=False)
        self.shuffler.restart((self.config.seed, epoch, 2))
        if self.proxies is not None:
            self.proxies.restart(features[kept], labels[kept], self.images.camids.to(labels.device)[kept])
            if self.config.compat:  # the published code scales the columns of the matrix, not its rows
                self.proxies.features.copy_(F.normalize(self.proxies.features, dim=0))
        return labels

    def batches(self, labels: Tensor, epoch: int) -> list[list[int]]:
        from fastreid_u.data.samplers import MoreCamera, iterations

        c = self.config
        camids = self.images.camids
        camids = [0] * len(labels) if c.no_cam or camids is None else camids.tolist()
        sampler = MoreCamera(labels.tolist(), camids, c.num_instances, seed=c.seed, epoch=epoch)
        return iterations(sampler, c.iters or None, c.batch_size)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The network's first strong view, the teacher's second one and its weak one; (B, D) each, of any length."""
        first, second, weak = batch.views
        student = _before_scaling(self.model, first)
        # Another order of the rows for the teacher, so that its BatchNorm groups are not those of the student.
        order = self.shuffler.permutation(len(first)).to(first.device)
        back = order.argsort()
        with torch.no_grad():
            if self.config.compat:  # published code looks at this view too; only BatchNorm's averages notice
                _before_scaling(self.teacher, first[order])
            second, weak = (_before_scaling(self.teacher, view[order])[back] for view in (second, weak))
        return student, second, weak

    def loss(self, outputs: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Tensor:
        c = self.config
        student, second, weak = outputs
        clusters = cluster_nce(
            student, batch.targets, self.centres, temperature=c.temp, normalize=False, smoothing=c.smoothing
        )
        hard = hard_instance_nce(student, second, batch.targets, temperature=c.hard_temp)
        soft = consistency_kl(student, second, weak, temperature=c.soft_temp)
        loss = clusters + c.hard_weight * hard + c.soft_weight * soft
        if self.proxies is not None:
            loss = loss + self.proxies.loss(student, self.proxies.rows(batch.targets, batch.camids))
        return loss

    def update(self, outputs: tuple[Tensor, Tensor, Tensor], batch: Batch) -> None:
        ema_update_(self.teacher, self.model, self.config.alpha)


def _before_scaling(network: "ReIDModel", images: Tensor) -> Tensor:
    """(B, D) rows of the neck, not yet scaled to unit length."""
    return network.neck(network.pool(network.feature_map(images)))

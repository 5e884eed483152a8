# SPDX-License-Identifier: Apache-2.0
"""CAP: every cluster is split by camera into proxies, and learned within cameras first, then between them.

Wang, Lai, Huang, Gong, Hua: Camera-aware Proxies for Unsupervised Person Re-Identification, AAAI 2021 (arXiv
2012.10674). What it adds to the family: images of one person differ more from camera to camera than images of one
camera differ from person to person, so a cluster is remembered as one row per camera, and pulled together across them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastreid_u.config import IN_UNIT, NOT_NEGATIVE, POSITIVE, RENDERED, Config, at_least, changed, option
from fastreid_u.memory import ProxyMemory
from fastreid_u.recipe import Batch, Images, Paper, Recipe

if TYPE_CHECKING:
    from fastreid_u.data import View
    from fastreid_u.models import ReIDModel

CODE = "published code (4a04fef)"


@dataclass(frozen=True, kw_only=True)
class CAPConfig(Config):
    """Defaults are those of the published code, which runs on one GPU."""

    temp: float = option(0.07, "temperature of the softmax over proxies", source=CODE, rule=POSITIVE)
    momentum: float = option(0.2, "weight of the old proxy in an update", source=CODE, rule=IN_UNIT)
    inter_weight: float = option(0.5, "factor of the loss between cameras", source=CODE, rule=NOT_NEGATIVE)
    inter_start: int = option(5, "first epoch, from 0, with the loss between cameras", source=CODE, rule=NOT_NEGATIVE)
    hard_negatives: int = option(50, "negative proxies in the loss between cameras", source=CODE, rule=at_least(1))
    eps = changed(0.5, source=CODE)
    k1 = changed(20, source=CODE)
    stem_relu = changed(False, source=CODE)
    batch_size = changed(32, source=CODE)
    num_instances = changed(4, "images per proxy in a batch", source=CODE)
    iters = changed(0, "steps per epoch; 0 = as many as the clustered images fill batches", source=CODE)
    warmup_epochs = changed(10, source=CODE)
    warmup_factor = changed(0.01, source=CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # two images a group: cameras have seen three or four of a person
        "synthetic": {
            **RENDERED,
            "num_instances": 2,
            "temp": 0.1,
            "momentum": 0.8,
            "inter_start": 2,
            "warmup_epochs": 0,
        },
    }


class CAP(Recipe):
    name = "cap"
    paper = Paper("CAP", model="last", compat=True)
    Config = CAPConfig

    def __init__(self, config: CAPConfig, images: Images) -> None:
        super().__init__(config, images)
        images.require_cameras(self.name)

    def build(self, model: "ReIDModel") -> None:
        super().build(model)
        c = self.config
        self.memory = ProxyMemory(
            model.num_features, 0, c.temp, c.momentum, hard_negatives=c.hard_negatives, reduction="camera",
            compat=c.compat,
        )  # fmt: skip

    def views(self) -> "tuple[View, ...]":
        from fastreid_u.data import train_transform

        c = self.config
        view = train_transform(
            c.height, c.width, erase=c.erase, erase_area=(0.02, 0.2), erase_aspect=(0.3, 3.0),
            color_jitter=c.color_jitter, pixel_norm=c.pixel_norm,
        )  # fmt: skip
        return (view,)

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """What is drawn, and what is learned, are proxies: targets are rows of the memory."""
        kept = labels >= 0
        self.memory.restart(features[kept], labels[kept], self.images.camids.to(labels.device)[kept])
        return self.memory.rows(labels, self.images.camids)

    def batches(self, labels: Tensor, epoch: int) -> list[list[int]]:
        from fastreid_u.data.samplers import ClassUniformly, iterations

        c = self.config
        sampler = ClassUniformly(labels.tolist(), c.num_instances, seed=c.seed, epoch=epoch)
        iters = c.iters or max(1, int((labels >= 0).sum()) // c.batch_size)
        return iterations(sampler, iters, c.batch_size)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        self.memory.inter_weight = self.config.inter_weight if batch.epoch >= self.config.inter_start else 0.0
        return self.memory.loss(outputs, batch.targets)

    def update(self, outputs: Tensor, batch: Batch) -> None:
        self.memory.update_(outputs, batch.targets)

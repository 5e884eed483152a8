# SPDX-License-Identifier: Apache-2.0
"""SpCL: a memory with one row per image, classes that are clusters or single images, and clusters chosen by trust.

Ge, Zhu, Chen, Zhao, Li: Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object Re-ID,
NeurIPS 2020 (arXiv 2006.02713). What it adds to the family: no image sits out. A class is compared by the mean of its
images' rows, so un-clustered images are classes of one; and a cluster counts only if a slightly tighter and a slightly
looser clustering agree with it, which fewer clusters fail as training goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastreid_u.config import IN_UNIT, POSITIVE, RENDERED, Config, changed, option
from fastreid_u.labels.self_paced import SelfPacedLabels
from fastreid_u.memory import InstanceMemory
from fastreid_u.ops.label_classes import own_classes
from fastreid_u.recipe import Batch, Extract, Images, Paper, Recipe

if TYPE_CHECKING:
    from fastreid_u.models import ReIDModel

PAPER = "SpCL, arXiv 2006.02713"
CODE = "published code (01a486e)"
LONG = {"iters": 800}
VEHICLES = {"height": 224, "width": 224, **LONG}


@dataclass(frozen=True, kw_only=True)
class SpCLConfig(Config):
    """Defaults are those of the published code, on ResNet-50 with 4 GPUs emulated by ``bn_group``."""

    temp: float = option(0.05, "temperature of the softmax over classes", source=PAPER, rule=POSITIVE)
    momentum: float = option(0.2, "weight of an image's old row in an update", source=PAPER, rule=IN_UNIT)
    eps_gap: float = option(0.02, "the tighter and the looser clustering are at eps -+ this", source=CODE)
    keep: float = option(
        0.9, "share of the first epoch's clusters that set the bar of independence", source=CODE, rule=IN_UNIT
    )
    refresh: bool = option(False, "extract the images' rows anew in every epoch, not only in the first", source=CODE)
    bn_group = changed(16, source="64 images on 4 GPUs")
    batch_size = changed(64, source=CODE)
    num_instances = changed(4, source=CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "msmt17": LONG,
        "veri": VEHICLES,
        "vehicleid": VEHICLES,
        "vehiclex": VEHICLES,
        "synthetic": {**RENDERED, "temp": 0.1, "epochs": 30, "step_size": 25},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_paces(self)


def require_paces(config: Config) -> None:
    """The rule between fields that ``SelfPacedLabels`` reads of a config."""
    if not 0 <= config.eps_gap < min(config.eps, 1 - config.eps):
        raise ValueError(f"config: eps_gap must keep eps -+ eps_gap within (0, 1), got {config.eps_gap!r}")


class SpCL(Recipe):
    """The memory outlives the epochs and is what gets clustered; unless ``refresh``, features are extracted once."""

    name = "spcl"
    paper = Paper("SpCL")
    Config = SpCLConfig

    def __init__(self, config: SpCLConfig, images: Images) -> None:
        super().__init__(config, images)
        self.labels = SelfPacedLabels(config, images)

    @property
    def sources(self) -> int:
        """Rows of the memory that come before those of the images."""
        return 0

    def build(self, model: "ReIDModel") -> None:
        """Beside the network a memory with a row per image: zeros for one that could not be read."""
        super().build(model)
        c, rows = self.config, self.sources + self.images.count
        self.memory = InstanceMemory(
            model.num_features, rows, c.temp, c.momentum, num_source_classes=self.sources, normalize=False
        )

    def features(self, extract: Extract, epoch: int) -> Tensor:
        rows = self.memory.features[self.sources :]
        if epoch == 0 or self.config.refresh:
            rows.copy_(extract(self.model).nan_to_num(0.0))
        return rows

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        classes = own_classes(labels, self.images.readable.to(labels.device))
        self.memory.set_labels(classes)
        return classes

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.memory.loss(outputs, batch.indices)

    def update(self, outputs: Tensor, batch: Batch) -> None:
        self.memory.update_(outputs, batch.indices)

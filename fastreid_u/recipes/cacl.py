# SPDX-License-Identifier: Apache-2.0
"""CACL: a second network that only sees grey images keeps the first one from living on colour.

Li, Li, Guo: Cluster-guided Asymmetric Contrastive Learning for Unsupervised Person Re-Identification, IEEE TIP 2022
(arXiv 2106.07846). What it adds to the family: two networks without shared weights, colour and grey views of the same
image, a predictor by which the first agrees with what the second sees; clusters refined by a tighter clustering.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u.config import IN_UNIT, NOT_NEGATIVE, POSITIVE, RENDERED, Config, Rule, changed, option
from fastreid_u.labels.refined import RefinedLabels
from fastreid_u.memory import InstanceMemory
from fastreid_u.models import set_bn_group
from fastreid_u.ops.cosine_align import cosine_align
from fastreid_u.ops.label_classes import own_classes
from fastreid_u.recipe import Batch, Extract, Images, Paper, Recipe

if TYPE_CHECKING:
    from fastreid_u.data import View
    from fastreid_u.data.transforms import Normalize
    from fastreid_u.models import ReIDModel

PAPER = "CACL, arXiv 2106.07846"
CODE = "published code (c63a31b)"


@dataclass(frozen=True, kw_only=True)
class CACLConfig(Config):
    """Defaults are those of the published code, which departs from its paper in ``focal_gamma`` and ``refinement``."""

    temp: float = option(0.05, "temperature of the softmax over classes", source=PAPER, rule=POSITIVE)
    momentum: float = option(0.2, "weight of an image's old row in an update", source=PAPER, rule=IN_UNIT)
    focal_gamma: float = option(
        4.0, "exponent of the focal factor; the paper says 2", source=CODE,
        rule=Rule("be 0 or at least 1", lambda v: v == 0 or v >= 1),
    )  # fmt: skip
    eps_gap: float = option(0.02, "the tighter clustering is at eps - this", source=CODE)
    refinement: str = option(
        "official",
        "which members of a split cluster leave it; mean_to_cluster is how the paper's text reads",
        source=CODE,
        choices=("official", "mean_to_cluster", "none"),
    )
    ratio: float = option(
        1.0, "factor on a tight part's score in the refinement; more dissolves more", source=CODE, rule=POSITIVE
    )
    grey: bool = option(True, "show the second network grey images; without it, another colour view", source=PAPER)
    pair_weight: float = option(
        1.0, "weight of agreeing with the grey view of the same image", source=PAPER, rule=NOT_NEGATIVE
    )
    cluster_weight: float = option(
        1.0, "weight of agreeing with the grey mean of the same cluster", source=PAPER, rule=NOT_NEGATIVE
    )
    refresh: bool = option(
        False, "extract the rows of both memories anew in every epoch, not only in the first", source=CODE
    )
    batch_size = changed(64, source=CODE)
    num_instances = changed(4, source=CODE)
    epochs = changed(80, source=CODE)
    eval_step = changed(5, source=CODE)
    seed = changed(111, source=CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "synthetic": {**RENDERED, "temp": 0.1, "refinement": "mean_to_cluster", "epochs": 30, "step_size": 25},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eps_gap < self.eps:
            raise ValueError(f"config: eps_gap must keep eps - eps_gap positive, got {self.eps_gap!r}")


class Predictor(nn.Module):
    """(B, D) pooled features of the colour network to (B, D): linear, then BatchNorm without a bias to train."""

    def __init__(self, num_features: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_features)
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out", generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)
        self.norm = nn.BatchNorm1d(num_features)
        self.norm.bias.requires_grad_(False)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.linear(pooled).float())


class SeesGrey(nn.Module):
    """``network`` on the luminance of normalised (B, 3, H, W) images, for features of images as they are."""

    def __init__(self, network: nn.Module, pixels: "Normalize") -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(pixels.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(pixels.std)[:, None, None])
        self.register_buffer("luminance", torch.tensor([0.299, 0.587, 0.114])[:, None, None])  # ITU-R BT.601

    def forward(self, images: Tensor) -> Tensor:
        grey = ((images * self.std + self.mean) * self.luminance).sum(dim=1, keepdim=True)
        return self.network((grey - self.mean) / self.std)


class Step(NamedTuple):
    """What ``forward`` gives: (B, D) rows."""

    colour: Tensor  # unit rows
    predicted: Tensor  # by the colour network, of what the grey one sees
    grey: Tensor  # unit rows


class CACL(Recipe):
    """One memory per network; the colour network's is clustered, and that network is the result."""

    name = "cacl"
    paper = Paper("CACL", compat=True)
    Config = CACLConfig

    def __init__(self, config: CACLConfig, images: Images) -> None:
        super().__init__(config, images)
        self.labels = RefinedLabels(config, images)

    def build(self, model: "ReIDModel") -> None:
        super().build(model)
        c = self.config
        self.grey = copy.deepcopy(model)
        self.predictor = Predictor(model.num_features, c.seed)
        set_bn_group(self.predictor, c.bn_group, c.bn_running)
        self.memory, self.grey_memory = (
            InstanceMemory(model.num_features, self.images.count, c.temp, c.momentum, normalize=False) for _ in range(2)
        )

    def views(self) -> "tuple[View, ...]":
        from fastreid_u.data import train_transform

        c = self.config
        shared = dict(erase=c.erase, color_jitter=c.color_jitter, pixel_norm=c.pixel_norm)
        return tuple(train_transform(c.height, c.width, grey=grey, **shared) for grey in (0.0, float(c.grey)))

    def features(self, extract: Extract, epoch: int) -> Tensor:
        """The colour network's memory; zeros for an image that could not be read."""
        from fastreid_u.data.transforms import normalize_by

        rows = self.memory.features
        if epoch == 0 or self.config.refresh:
            grey = self.grey
            if self.config.grey and not self.config.compat:  # published code starts the grey memory from colour images
                grey = SeesGrey(grey, normalize_by(self.config.pixel_norm)).to(rows.device)
            rows.copy_(extract(self.model).nan_to_num(0.0))
            self.grey_memory.features.copy_(extract(grey).nan_to_num(0.0))
        return rows

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        classes = own_classes(labels, self.images.readable.to(labels.device))
        self.memory.set_labels(classes)
        self.grey_memory.set_labels(classes)
        return classes

    def forward(self, batch: Batch) -> Step:
        colour, grey = batch.views
        pooled = self.model.pool(self.model.feature_map(colour))
        return Step(F.normalize(self.model.neck(pooled)), self.predictor(pooled), self.grey(grey))

    def loss(self, outputs: Step, batch: Batch) -> Tensor:
        c = self.config
        own = self.memory.loss(outputs.colour, batch.indices, focal=c.focal_gamma)
        other = self.grey_memory.loss(outputs.grey, batch.indices, focal=c.focal_gamma)
        same_image = cosine_align(outputs.predicted, outputs.grey)
        same_cluster = cosine_align(outputs.predicted, self.grey_memory.cluster_means, batch.targets)
        return own + other + c.pair_weight * same_image + c.cluster_weight * same_cluster

    def update(self, outputs: Step, batch: Batch) -> None:
        self.memory.update_(outputs.colour, batch.indices)
        self.grey_memory.update_(outputs.grey, batch.indices)

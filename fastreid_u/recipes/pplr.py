# SPDX-License-Identifier: Apache-2.0
"""PPLR: the whole body and its parts correct each other's pseudo-labels, as far as they agree about who is alike.

Cho, Kim, Hong, Yoon: Part-based Pseudo Label Refinement for Unsupervised Person Re-identification, CVPR 2022 (arXiv
2203.14675). What it adds to the family: three horizontal stripes of the feature map get a neck and a classifier each.
Where a stripe's neighbours are those of the whole body, its prediction refines the label of the whole; where they are
not, its own label is smoothed. ``pplr_camera`` adds the loss between cameras.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u.config import IN_UNIT, NOT_NEGATIVE, POSITIVE, RENDERED, Config, at_least, changed, option
from fastreid_u.memory import ProxyMemory
from fastreid_u.ops.batch_hard_triplet import batch_hard_triplet
from fastreid_u.ops.centroids import cluster_centroids
from fastreid_u.ops.cluster_nce import cluster_nce
from fastreid_u.ops.knn import knn
from fastreid_u.ops.neighbour_overlap import neighbour_overlap
from fastreid_u.recipe import Batch, Extract, Images, Paper, Recipe

if TYPE_CHECKING:
    from fastreid_u.models import ReIDModel

CODE = "published code"


@dataclass(frozen=True, kw_only=True)
class PPLRConfig(Config):
    """Defaults are those of the published code without cameras, on 4 GPUs emulated by ``bn_group``."""

    parts: int = option(3, "horizontal stripes of the feature map", source=CODE, rule=at_least(1))
    agreement_k: int = option(20, "neighbours compared between a part and the whole", source=CODE, rule=at_least(1))
    beta: float = option(0.5, "share of the cluster in the label of the whole", source=CODE, rule=IN_UNIT)
    smoothing: float = option(
        0.1, "share of a part's label spread over all clusters before aals_start", source=CODE, rule=IN_UNIT
    )
    aals_start: int = option(
        5, "first epoch, from 0, in which a part's agreement decides that share", source=CODE, rule=NOT_NEGATIVE
    )
    max_clusters: int = option(3000, "classifier rows, more than there will be clusters", source=CODE, rule=at_least(1))
    camera_weight: float = option(
        0.0, "factor of the loss between cameras; see pplr_camera", source=CODE, rule=NOT_NEGATIVE
    )
    camera_temp: float = option(0.07, "its temperature", source=CODE, rule=POSITIVE)
    hard_negatives: int = option(50, "negative proxies in the loss between cameras", source=CODE, rule=at_least(1))
    height = changed(384, source=CODE)
    eps = changed(0.5, source=CODE)
    bn_group = changed(16, source="64 images on 4 GPUs")
    batch_size = changed(64, source=CODE)
    num_instances = changed(4, source=CODE)
    eval_step = changed(5, source=CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "veri": {"height": 256, "width": 256, "num_instances": 8, "eps": 0.7},
        "synthetic": {**RENDERED, "aals_start": 2},
    }


class PPLR(Recipe):
    name = "pplr"
    paper = Paper("PPLR")
    Config = PPLRConfig

    def __init__(self, config: PPLRConfig, images: Images) -> None:
        super().__init__(config, images)
        if config.camera_weight > 0:
            images.require_cameras(self.name, unless="camera_weight=0")

    def build(self, model: "ReIDModel") -> None:
        """Beside the network a neck for each part; a classifier without bias, and proxies, for whole and parts."""
        super().build(model)
        c, rows = self.config, min(self.config.max_clusters, self.images.count)
        # Copies of the network's neck: as fresh as it is, or as well calibrated.
        self.part_necks = nn.ModuleList(copy.deepcopy(model.bnneck) for _ in range(c.parts))
        weights = (nn.Parameter(torch.zeros(rows, model.num_features)) for _ in range(1 + c.parts))
        self.classifiers = nn.ParameterList(weights)
        self.clusters = 0  # how many rows of the classifiers are in use
        self.register_buffer("agreement", torch.zeros(self.images.count, c.parts))
        shares = [c.camera_weight] + [c.camera_weight / c.parts] * c.parts
        self.proxies = nn.ModuleList(
            ProxyMemory(
                model.num_features, 0, c.camera_temp, intra_weight=0.0, inter_weight=share,
                hard_negatives=c.hard_negatives, positives="other_cameras",
            )
            for share in shares if share > 0
        )  # fmt: skip

    # Once an epoch

    def features(self, extract: Extract, epoch: int) -> Tensor:
        rows = extract(_WholeAndParts(self.model, self.part_necks))
        self.rows = rows.chunk(1 + self.config.parts, dim=1)  # of the whole, then of each part, of unit length each
        return self.rows[0]

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        kept = labels >= 0
        self.clusters, rows = int(labels.max()) + 1, len(self.classifiers[0])
        if self.clusters > rows:
            raise ValueError(f"pplr: max_clusters must hold the {self.clusters} clusters of epoch {epoch}, got {rows}")
        with torch.no_grad():
            for weight, own in zip(self.classifiers, self.rows, strict=True):
                weight[: self.clusters] = cluster_centroids(own[kept], labels[kept])
        self.agreement = self.agree()
        for proxies, own in zip(self.proxies, self.rows):  # noqa: B905 - there are none without cameras
            proxies.restart(own[kept], labels[kept], self.images.camids.to(labels.device)[kept])
        del self.rows
        return labels

    def agree(self) -> Tensor:
        """(N, parts) in [0, 1]: overlap of each image's nearest neighbours in each part with those of the whole."""
        readable = self.images.readable.to(self.rows[0].device)
        lists = [knn(own[readable], self.config.agreement_k + 1)[1][:, 1:] for own in self.rows]
        agreement = torch.zeros(len(readable), self.config.parts, device=readable.device)
        agreement[readable] = torch.stack([neighbour_overlap(lists[0], part) for part in lists[1:]], dim=1)
        return agreement

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.clusters)

    def set_extra_state(self, state: Tensor) -> None:
        self.clusters = int(state)

    # A step

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, D) of the whole and of each part, as the necks give them, not of unit length."""
        return whole_and_parts(self.model, self.part_necks, batch.images)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        c = self.config
        whole, *parts = outputs
        refined = batch.epoch >= c.aals_start
        weights = [weight[: self.clusters] for weight in self.classifiers]
        agreement = self.agreement[batch.indices]
        classify = {"temperature": 1.0, "normalize": False}

        with torch.no_grad():
            guesses = [(part @ weight.T).softmax(dim=1) for part, weight in zip(parts, weights[1:], strict=True)]
            ensemble = (torch.stack(guesses, dim=1) * agreement.softmax(dim=1)[:, :, None]).sum(dim=1)
        loss = cluster_nce(
            whole, batch.targets, weights[0], extra_target=ensemble, extra_weight=1 - c.beta, **classify
        ) + batch_hard_triplet(whole, batch.targets)

        for part, weight, agreed in zip(parts, weights[1:], agreement.unbind(dim=1), strict=True):
            smoothing = 1 - agreed if refined else c.smoothing
            own = cluster_nce(part, batch.targets, weight, smoothing=smoothing, **classify)
            if refined:  # published as a divergence from the uniform distribution, which is less by its entropy
                own = own - smoothing.mean() * math.log(self.clusters)
            loss = loss + own / c.parts

        for proxies, rows in zip(self.proxies, outputs):  # noqa: B905 - there are none without cameras
            loss = loss + proxies.loss(rows, proxies.rows(batch.targets, batch.camids))
        return loss


def whole_and_parts(model: "ReIDModel", part_necks: nn.ModuleList, images: Tensor) -> tuple[Tensor, ...]:
    """(B, D) of the neck of the whole, and of each part's neck behind the mean of its stripe of the map."""
    feature_map = model.feature_map(images)
    if feature_map.ndim != 4:
        raise ValueError(f"pplr: arch must give a feature map to cut into stripes, got rows from {model.arch}")
    stripes = F.adaptive_avg_pool2d(feature_map.float(), (len(part_necks), 1)).squeeze(3).unbind(dim=2)
    parts = [neck(stripe) for neck, stripe in zip(part_necks, stripes, strict=True)]
    return model.neck(model.pool(feature_map)), *parts


class _WholeAndParts(nn.Module):
    """What ``extract`` is given: all rows of an image behind one another, each of unit length."""

    def __init__(self, model: "ReIDModel", part_necks: nn.ModuleList) -> None:
        super().__init__()
        self.model, self.part_necks = model, part_necks

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([F.normalize(rows) for rows in whole_and_parts(self.model, self.part_necks, images)], dim=1)

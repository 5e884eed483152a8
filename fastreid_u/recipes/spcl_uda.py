# SPDX-License-Identifier: Apache-2.0
"""SpCL with a labelled source: one memory over source identities, target clusters and single target images.

Ge et al., NeurIPS 2020 (see ``spcl``), its domain-adaptive form. Every BatchNorm is one per domain; weights are shared.
A source identity is one row of the memory, the target has a row per image, and each is a negative of all others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastreid_u.config import option
from fastreid_u.models.domains import domain, single_domain, split_domains
from fastreid_u.ops.centroids import cluster_centroids
from fastreid_u.ops.momentum_update import momentum_update_
from fastreid_u.recipe import Batch, Extract, Paper, Recipe
from fastreid_u.recipes.spcl import CODE, SpCL, SpCLConfig

if TYPE_CHECKING:
    from fastreid_u.models import ReIDModel


class TwoDomains(Recipe):
    """The network with two BatchNorms for each one, and its forward on a batch of both domains."""

    @cached_property
    def people(self) -> int:
        """P, how many identities the source has."""
        return int(self.images.source.pids.max()) + 1

    def build(self, model: "ReIDModel") -> None:
        split_domains(model)
        super().build(model)

    def ranked(self) -> dict[str, nn.Module]:
        return {"model": single_domain(self.model)}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of target and of source images."""
        with domain(self.model, "source"):
            labelled = self.model(batch.source.images)
        return self.model(batch.images), labelled

    def source_centroids(self, extract: Extract, bn: str = "source") -> Tensor:
        """(P, D) unit means of the source identities' features; zeros where no image of one could be read."""
        with domain(self.model, bn):
            rows = extract(self.model, of="source")
        pids = self.images.source.pids.to(rows.device)
        readable = self.images.source.readable.to(rows.device)
        centroids = rows.new_zeros(self.people, rows.shape[1])
        found = cluster_centroids(rows[readable], pids[readable])
        centroids[: len(found)] = found
        return centroids


@dataclass(frozen=True, kw_only=True)
class SpCLUDAConfig(SpCLConfig):
    """As ``spcl``; a step takes ``batch_size`` images of each domain."""

    source: str | None = option(None, "labelled set to learn from as well: a name, folder or CSV", source=CODE)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **SpCLConfig.PER_DATASET,
        "synthetic": {**SpCLConfig.PER_DATASET["synthetic"], "source": "synthetic"},
    }


class SpCLUDA(TwoDomains, SpCL):
    """Rows 0 .. P - 1 of the memory are the source's identities, the others the target's images."""

    name = "spcl_uda"
    paper = Paper("SpCL, domain adaptive", compat=True)
    Config = SpCLUDAConfig

    def build(self, model: "ReIDModel") -> None:
        super().build(model)
        if self.config.compat:  # published code splits a BatchNorm by making new ones, whose bias is then trained
            for neck in (model.bnneck.source, model.bnneck.target):
                neck.bias.requires_grad_(True)

    @property
    def sources(self) -> int:
        return self.people

    def features(self, extract: Extract, epoch: int) -> Tensor:
        if epoch == 0:
            self.memory.features[: self.people] = self.source_centroids(extract)
        return super().features(extract, epoch)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        own, labelled = outputs
        rows, identities = batch.indices + self.people, batch.source.targets
        if self.config.compat:
            return self.memory.loss(own, rows) + self._loss_after_target(labelled, identities, own, rows)
        return self.memory.loss(own, rows) + self.memory.loss(labelled, identities)

    def update(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> None:
        own, labelled = outputs
        self.memory.update_(own, batch.indices + self.people)
        self.memory.update_(labelled, batch.source.targets)

    def _loss_after_target(self, labelled: Tensor, identities: Tensor, own: Tensor, rows: Tensor) -> Tensor:
        """The source's loss with the gradient that published code gives it.

        There the target's part of backward comes first and moves the target's rows, which the source's part then
        reads: the gradient is that of the logits before the step, carried back through the rows after it.
        """
        memory, means = self.memory, self.memory.cluster_means.clone()
        touched, row_of = rows.unique(return_inverse=True)
        momentum_update_(
            memory.features[touched], own.detach(), row_of, momentum=memory.momentum, rule="row", normalize=False,
            labels=memory.labels[touched], cluster_sizes=memory.cluster_sizes, cluster_means=means,
        )  # fmt: skip
        logits = labelled.detach() @ memory.cluster_means.T / memory.temp
        logits = logits.masked_fill(memory.cluster_sizes == 0, -torch.inf)
        e = torch.full((), memory.epsilon, device=logits.device)
        p = torch.exp(logits - torch.logaddexp(logits.logsumexp(dim=1), e.log())[:, None])
        own_p = p.gather(1, identities[:, None])
        p.scatter_add_(1, identities[:, None], -torch.ones_like(own_p))
        to_x = (own_p / (own_p + e) * p) @ means / (memory.temp * len(p))
        carried = (labelled * to_x).sum()
        return memory.loss(labelled.detach(), identities) + carried - carried.detach()

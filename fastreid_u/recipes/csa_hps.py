# SPDX-License-Identifier: Apache-2.0
"""CSA + HPS: prototypes by attention among the images of a cluster, moved by the image its peers attend to least.

"A new robust contrastive learning for unsupervised person re-identification", IJMLC 2023 (DOI
10.1007/s13042-023-01997-1). Only its abstract was to be had: no code, no formula, no figure. What is here is OUR design
of what the abstract names (cluster sample aggregation, hard positive sampling by a dispersion degree, self-attention
aggregation), every choice of it named in docs/methods/csa_hps.md; it reproduces no published number.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u.config import IN_UNIT, NOT_NEGATIVE, POSITIVE, RENDERED, Rule, at_least, changed, option
from fastreid_u.memory import ClusterMemory
from fastreid_u.ops.segment_attention import segment_attention
from fastreid_u.ops.segments import segment_sum
from fastreid_u.recipe import Batch, Paper
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig


@dataclass(frozen=True, kw_only=True)
class CSAHPSConfig(ClusterContrastConfig):
    """Cluster Contrast's settings, and our own choices for what is added."""

    iters = changed(200)
    heads: int = option(8, "attention heads; must divide the width of a feature", rule=at_least(1))
    saa_scale: float = option(10.0, "initial scale of attention logits: temperature 0.1 on cosines", rule=POSITIVE)
    saa_steps: int = option(100, "steps per epoch that the attention is trained for; 0 = never", rule=NOT_NEGATIVE)
    saa_lr: float = option(1e-4, "Adam's learning rate of the attention", rule=POSITIVE)
    saa_noise: float = option(0.1, "share of intruders that the attention is trained to pass over", rule=IN_UNIT)
    update_rule: str = option(
        "dispersed", "which images move a memory row: the most dispersed of a cluster (HPS), or as Cluster Contrast",
        choices=("dispersed", "sequential", "hard"),
    )  # fmt: skip
    use_hard = changed(False, rule=Rule("be False, as update_rule says which images count", operator.not_))

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **ClusterContrastConfig.PER_DATASET,
        "msmt17": {"eps": 0.7, "iters": 400},
        "personx": {"eps": 0.7},
        "synthetic": {**RENDERED, "temp": 0.1, "momentum": 0.8},
    }


class Aggregation(nn.Module):
    """Multi-head self-attention within a cluster (SAA), with values and output left as they are.

    Queries and keys are projected by matrices that start as the identity: before any training, attention is a softmax
    over cosines. An image never attends to itself, whose cosine of 1 would drown the others.
    """

    def __init__(self, width: int, heads: int, scale: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"config: heads must divide the {width} numbers of a feature, got {heads}")
        self.query, self.key = (nn.Parameter(torch.eye(width)) for _ in range(2))
        self.scale = nn.Parameter(torch.full((heads,), scale))

    def received(self, x: Tensor, labels: Tensor) -> Tensor:
        """(N, H) attention that each of ``x`` (N, D), unit rows, receives from its label's others."""
        return segment_attention(x @ self.query, x @ self.key, labels, heads=len(self.scale), scale=self.scale)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(C, D) unit prototypes of labels 0 .. C - 1: means weighed by attention, head by head (CSA)."""
        weights = self.received(x, labels)
        weighted = x.unflatten(1, (weights.shape[1], -1)) * weights[:, :, None]
        return F.normalize(segment_sum(weighted.flatten(1), labels), dim=1)


class CSAHPS(ClusterContrast):
    name = "csa_hps"
    paper = Paper("CSA + HPS (our design)", published=False)
    Config = CSAHPSConfig

    def build(self, model: nn.Module) -> None:
        super().build(model)
        c = self.config
        rule = "index" if c.update_rule == "dispersed" else c.update_rule
        self.memory = ClusterMemory(model.num_features, 0, c.temp, c.momentum, rule=rule)
        self.aggregation = Aggregation(model.num_features, c.heads, c.saa_scale)
        self.aggregation.requires_grad_(False)  # it has an optimiser of its own

    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        c, kept = self.config, labels >= 0
        rows, clusters = features[kept], labels[kept]
        train_aggregation(
            self.aggregation, rows, clusters, steps=c.saa_steps, lr=c.saa_lr, noise=c.saa_noise, temperature=c.temp,
            seed=(c.seed, epoch),
        )  # fmt: skip
        self.memory.restart(self.aggregation(rows, clusters))
        return labels

    def update(self, outputs: Tensor, batch: Batch) -> None:
        if self.config.update_rule != "dispersed":
            super().update(outputs, batch)
            return
        received = self.aggregation.received(outputs, batch.targets).mean(dim=1)
        index = least_attended(received, batch.targets, len(self.memory.features))
        self.memory.update_(outputs, batch.targets, index=index)


def least_attended(received: Tensor, targets: Tensor, classes: int) -> Tensor:
    """(classes,) the row of each class that received least, the first on ties; -1 where the batch has none.

    The dispersion degree of n images is -log(n received); within a class its order is that of ``received``, reversed.
    """
    row = torch.arange(len(targets), device=targets.device)
    taking = targets >= 0
    column = targets.clamp(min=0)
    least = received.new_full((classes,), torch.inf)
    least.scatter_reduce_(0, column, received.masked_fill(~taking, torch.inf), "amin")
    candidates = row.masked_fill((received != least[column]) | ~taking, len(row))
    first = torch.full((classes,), len(row), device=targets.device).scatter_reduce_(0, column, candidates, "amin")
    return first.masked_fill_(first == len(row), -1)


def train_aggregation(
    aggregation: Aggregation,
    features: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    noise: float,
    temperature: float,
    seed: tuple[int, ...],
    clusters: int = 64,
    members: int = 16,
) -> None:
    """Teach the attention to pass over intruders: half of a cluster's images, some exchanged, must find the other half.

    A step draws ``clusters`` clusters and ``members`` images of each, with replacement where there are fewer; the first
    half, ``noise`` of it replaced by images of other clusters, makes a prototype, which the second half must pick
    among all prototypes. Nothing is done with fewer than two clusters. The attention is frozen afterwards.
    """
    order = labels.cpu().argsort(stable=True).numpy()
    groups = np.split(order, np.flatnonzero(np.diff(labels.cpu().numpy()[order])) + 1)
    if len(groups) < 2 or steps == 0:
        return
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(aggregation.parameters(), lr=lr)
    half = members // 2
    aggregation.requires_grad_(True)
    for _ in range(steps):
        drawn = rng.choice(len(groups), min(clusters, len(groups)), replace=False)
        images = np.stack([rng.choice(groups[c], members, replace=len(groups[c]) < members) for c in drawn])
        support, query = images[:, :half].copy(), images[:, half:]
        for i, j in np.argwhere(rng.random(support.shape) < noise):
            support[i, j] = rng.choice(groups[drawn[(i + rng.integers(1, len(drawn))) % len(drawn)]])
        own = torch.arange(len(drawn), device=features.device)
        prototypes = aggregation(features[support.ravel()], own.repeat_interleave(half))
        logits = features[query.ravel()] @ prototypes.T / temperature
        loss = F.cross_entropy(logits, own.repeat_interleave(members - half))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    aggregation.requires_grad_(False)

# SPDX-License-Identifier: Apache-2.0
"""DCCC: a DBSCAN radius that shrinks, a memory that follows the harder images, targets softened by a teacher.

He et al.: DCCC, Dynamic Clustering and Cluster Contrast, ICASSP 2024 (arXiv 2303.06810). What it adds to Cluster
Contrast: eps falls over the epochs, because clusters tighten while the network learns; a row of the memory moves to
the weighted mean of its images, the less similar the heavier; and the target of an image is mixed with what an
averaged teacher says of another view of it.
"""

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastreid_u.config import IN_UNIT, POSITIVE, RENDERED, Rule, at_least, changed, option
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.memory import ClusterMemory
from fastreid_u.ops.ema_update import ema_update_
from fastreid_u.recipe import Batch, Images, Paper
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig

COMMANDS = "published training commands (102d8ef)"
CODE = "published code (102d8ef)"
_FLOOR = 0.399  # no schedule goes on below it


@dataclass(frozen=True, kw_only=True)
class DCCCConfig(ClusterContrastConfig):
    """Defaults are those of the published Market-1501 command."""

    eps = changed(0.7, "DBSCAN radius in Jaccard distance, before its schedule", source=COMMANDS)
    eps_scheduler: str = option(
        "expo", "how eps falls over the epochs", source=COMMANDS, choices=("fix", "step", "linear", "expo", "log")
    )
    eps_step: int = option(5, "epochs between drops of the step schedule", source=CODE, rule=at_least(1))
    update_rule: str = option(
        "weighted", "which images move a memory row", source=COMMANDS,
        choices=("weighted", "hard", "mean", "sequential"),
    )  # fmt: skip
    use_hard = changed(False, source=CODE, rule=Rule("be False, as update_rule says which images count", operator.not_))
    tau_w: float = option(0.03, "temperature of the weights in the weighted update", source=COMMANDS, rule=POSITIVE)
    smooth: float = option(
        0.3, "share of the teacher's distribution in the softened target", source=COMMANDS, rule=IN_UNIT
    )
    soft_ce_weight: float = option(
        1.0, "weight of the softened loss; the hard one has the rest", source=COMMANDS, rule=IN_UNIT
    )
    ema: float = option(
        0.999, "weight of the old teacher, once it has averaged over 1,000 steps", source=CODE, rule=IN_UNIT
    )
    pooling_type = changed("avg", "spatial pooling", source=CODE)
    epochs = changed(70, source=COMMANDS)
    iters = changed(200, source=COMMANDS)
    step_size = changed(0, source=CODE)
    warmup_epochs = changed(10, source=CODE)
    seed = changed(3407, source=COMMANDS)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dukemtmcreid": {"tau_w": 0.07, "smooth": 0.1, "seed": 1},
        "msmt17": {"eps": 0.8, "epochs": 80, "tau_w": 0.6, "smooth": 0.1, "seed": 1},
        "synthetic": {
            **RENDERED, "temp": 0.1, "momentum": 0.8, "eps": 0.55, "warmup_epochs": 0, "smooth": 0.1, "tau_w": 0.6,
            "pooling_type": "gem",
        },
    }  # fmt: skip

    @property
    def teacher_weight(self) -> float:
        """(1 - λ) hard cross-entropy + λ softened with share s is one cross-entropy with the share λ s."""
        return self.soft_ce_weight * self.smooth


def scheduled_eps(config: DCCCConfig, epoch: int) -> float:
    """eps of ``epoch``, by its closed form or by the published steps up to it; the first drop comes before epoch 0."""
    eps = config.eps
    if config.eps_scheduler == "log":
        return eps - eps / 2 * math.log(1 + epoch * (math.e - 1) / config.epochs)
    for e in range(epoch + 1):
        if eps <= _FLOOR:
            break
        if config.eps_scheduler == "step" and e % config.eps_step == 0:
            eps -= 0.006 * config.eps_step
        elif config.eps_scheduler == "linear":
            eps -= 0.005
        elif config.eps_scheduler == "expo":
            eps *= 0.99
    return eps


def teacher_momentum(step: int, limit: float) -> float:
    """Weight of the old teacher after optimiser step ``step``, counted from 0.

    Up to 98 the limit, at 99 a copy of the student, then the plain mean of the students since, up to the limit.
    """
    return limit if step < 99 else min(1 - 1 / (step - 98), limit)


class DCCC(ClusterContrast):
    name = "dccc"
    paper = Paper("DCCC")
    Config = DCCCConfig

    def __init__(self, config: DCCCConfig, images: Images) -> None:
        super().__init__(config, images)
        self.labels = DBSCANLabels(config, images, partial(scheduled_eps, config))

    def build(self, model: nn.Module) -> None:
        super().build(model)
        c = self.config
        rule, tau = c.update_rule, c.tau_w if c.update_rule == "weighted" else None
        self.memory = ClusterMemory(model.num_features, 0, c.temp, c.momentum, rule=rule, weight_temperature=tau)
        self.steps = 0
        self.teacher = copy.deepcopy(model).requires_grad_(False) if c.teacher_weight else None

    def ranked(self) -> Mapping[str, nn.Module]:
        return {"model": self.model} | ({"teacher": self.teacher} if self.teacher else {})

    def views(self) -> tuple:
        return super().views() * (2 if self.config.teacher_weight else 1)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        if not self.teacher:
            return (self.model(batch.images),)
        with torch.no_grad():  # in training mode: its BatchNorm has statistics of its own, of the second view
            teacher = self.teacher(batch.views[1])
        return self.model(batch.images), teacher

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        student, *teacher = outputs
        soft = {"teacher": teacher[0], "teacher_weight": self.config.teacher_weight} if teacher else {}
        return self.memory.loss(student, batch.targets, **soft)

    def update(self, outputs: tuple[Tensor, ...], batch: Batch) -> None:
        super().update(outputs[0], batch)
        self.follow()

    def follow(self) -> None:
        """Move the teacher after the network."""
        if self.teacher:
            ema_update_(self.teacher, self.model, teacher_momentum(self.steps, self.config.ema))
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)

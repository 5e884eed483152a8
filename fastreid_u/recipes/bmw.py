# SPDX-License-Identifier: Apache-2.0
"""BMW: a memory row is pulled by its hardest image and pushed from the nearest other row, both weighted.

BMW, NeurIPS 2025. What it adds to Cluster Contrast is the update alone: the further the hardest image of a cluster is
from the row, the stronger the pull; the nearer the most similar other row is, the stronger the push.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fastreid_u.config import NOT_NEGATIVE, RENDERED, Rule, changed, option
from fastreid_u.memory import ClusterMemory
from fastreid_u.recipe import Paper
from fastreid_u.recipes.cluster_contrast import ClusterContrast, ClusterContrastConfig

LOG = "published Market-1501 log (79c75fd)"
CODE = "published code (79c75fd)"


@dataclass(frozen=True, kw_only=True)
class BMWConfig(ClusterContrastConfig):
    """Defaults are those of the published Market-1501 log: one GPU, weights that are stronger than the others'."""

    push_weight: float = option(0.2, "weight of the push; the paper says 0.02 as well", source=CODE, rule=NOT_NEGATIVE)
    weights = changed("imagenet_v2", "torchvision's IMAGENET1K_V2, a file, or None for random", source=LOG)
    bn_group = changed(None, "images per BatchNorm group; one GPU, so the whole batch", source=LOG)
    momentum = changed(0.1, "1 - weight of the pull", source=CODE)
    use_hard = changed(False, source=CODE, rule=Rule("be False, as BMW has its own update", operator.not_))
    epochs = changed(75, source=LOG)
    iters = changed(200, source=LOG)
    step_size = changed(25, source=LOG)
    reset_optimizer = changed(True, source=CODE)
    eval_step = changed(1, source=LOG)

    PER_DATASET: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # the published commands of MSMT17 are comments only
        "msmt17": {"epochs": 60, "iters": 400, "step_size": 20},
        "synthetic": {**RENDERED, "temp": 0.1, "momentum": 0.5, "reset_optimizer": False},
    }


class BMW(ClusterContrast):
    name = "bmw"
    paper = Paper("BMW", compat=True)
    Config = BMWConfig

    def build(self, model: nn.Module) -> None:
        super().build(model)
        c = self.config
        # Published code moves one row after the other, so that a row may be pushed from one that has moved already.
        rule = "push_sequential" if c.compat else "push"
        self.memory = ClusterMemory(model.num_features, 0, c.temp, c.momentum, rule=rule, push_weight=c.push_weight)

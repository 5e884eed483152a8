# SPDX-License-Identifier: Apache-2.0
"""The optimiser that a config names, and its learning rate over the epochs."""

import torch
from torch import nn

from fastreid_u.config import Config


def make_optimizer(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Adam with L2 penalty on every trainable parameter, BatchNorm and GeM's exponent included, as published."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
    extra = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, **extra)


def learning_rate(config: Config, epoch: int) -> float:
    """Linear warm-up from ``warmup_factor`` of lr, times gamma for every ``step_size`` epochs passed."""
    drops = epoch // config.step_size if config.step_size else 0
    rise = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.lr * (config.warmup_factor * (1 - rise) + rise) * config.gamma**drops

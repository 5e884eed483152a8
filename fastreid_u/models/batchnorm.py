# SPDX-License-Identifier: Apache-2.0
"""Group-wise ("ghost") BatchNorm: statistics over groups of a batch; and the calibration of running statistics.

Published unsupervised Re-ID runs used ``nn.DataParallel`` on four GPUs: the batch is cut into four contiguous chunks,
each is normalised by its own mean and variance, and the running statistics are those of the first chunk alone,
because the replicas' buffers are thrown away. The results depend on it (docs/models.md), so one device must be able
to do the same.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastreid_u._checks import require_choice, require_positive_int

RUNNING = ("first", "mean")


def group_sizes(batch: int, group: int) -> list[int]:
    """How ``batch`` rows are cut into contiguous groups of ``group``.

    A remainder of less than half a group, or of one row, joins the group before it; a larger one is a group of its own.
    So a group of one row, which has no variance, arises only where ``group`` or ``batch`` is 1.

    >>> group_sizes(32, 16), group_sizes(36, 16), group_sizes(40, 16), group_sizes(5, 16)
    ([16, 16], [16, 20], [16, 16, 8], [5])
    """
    full, rest = batch // group, batch % group  # not divmod: torch.compile traces these for any batch size
    if full == 0:
        return [batch]
    sizes = [group] * full
    if 2 * rest >= group and rest > 1:
        sizes.append(rest)
    else:
        sizes[-1] += rest
    return sizes


class _GroupBatchNorm(_BatchNorm):
    """The part that GroupBatchNorm1d and GroupBatchNorm2d share; put before torch's class in the bases."""

    def __init__(self, num_features: int, group_size: int, running: str = "first", **batchnorm: Any) -> None:
        super().__init__(num_features, **batchnorm)
        self.group_size = require_positive_int(type(self).__name__, "group_size", group_size)
        self.running = require_choice(type(self).__name__, "running", running, RUNNING)

    def forward(self, x: Tensor) -> Tensor:
        sizes = group_sizes(x.shape[0], self.group_size) if self.training else []
        if len(sizes) < 2:
            return super().forward(x)
        self._check_input_dim(x)
        tracked = self.track_running_stats
        momentum = self._count_batch() if tracked else 0.0

        # A loop: viewing G groups of C channels as one batch of G * C channels needs the data permuted, there and
        # back, which costs more than G calls and loses the channels_last layout (2 to 3 times slower on a CPU).
        out, means, variances = [], [], []
        for i, chunk in enumerate(x.split(sizes)):
            mean = var = None
            if tracked and (i == 0 or self.running == "mean"):
                mean, var = self.running_mean.clone(), self.running_var.clone()
                means.append(mean)
                variances.append(var)
            out.append(F.batch_norm(chunk, mean, var, self.weight, self.bias, True, momentum, self.eps))
        if tracked:
            self.running_mean.copy_(torch.stack(means).mean(0))
            self.running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(out)

    def _count_batch(self) -> float:
        """Count this batch; returns the weight of its statistics, with torch's meaning of ``momentum=None``."""
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}, running={self.running!r}"


class GroupBatchNorm1d(_GroupBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of contiguous groups of rows, in batch order.

    Equal to one BatchNorm per group, as ``nn.DataParallel`` has it, gradients included. In eval mode, and for a batch
    of one group, it is BatchNorm1d itself. The state_dict is BatchNorm1d's.

    Args:
        num_features: channels C.
        group_size: images per group, >= 1; ``group_sizes`` cuts a batch that does not divide.
        running: "first" updates the running statistics from the first group alone, which is what DataParallel
            leaves behind; "mean" from the average over the groups, each counted once.
        **batchnorm: ``eps``, ``momentum``, ``affine``, ``track_running_stats``, ``device``, ``dtype`` as in torch.

    Shapes: (B, C) or (B, C, L), any floating dtype, to the same shape, dtype and memory format.
    """


class GroupBatchNorm2d(_GroupBatchNorm, nn.BatchNorm2d):
    """As :class:`GroupBatchNorm1d`, for (B, C, H, W) maps, contiguous or channels_last."""


class GroupBatchNormAct2d(GroupBatchNorm2d):
    """As :class:`GroupBatchNorm2d`, for timm's BatchNorm that is fused with what follows it.

    ``drop`` and ``act`` are the modules of the BatchNorm that it stands for; they see all groups at once. Made by
    ``set_bn_group``. ``plain`` is timm's class, to go back to.
    """

    plain: type[nn.BatchNorm2d]
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def set_bn_group(model: nn.Module, group: int | None, running: str = "first") -> None:
    """Set the group size of every BatchNorm1d, BatchNorm2d and BatchNormAct2d (timm's) inside ``model``, in place.

    Modules are replaced by their grouped or plain twin (hooks on them are lost); parameters and buffers stay the same
    objects, so optimisers, averaged copies and checkpoints are not disturbed.

    Args:
        model: any module that is not itself a BatchNorm.
        group: images per group, or None for ordinary BatchNorm; other kinds of BatchNorm are then left alone.
        running: "first" or "mean", see :class:`GroupBatchNorm1d`.

    Raises:
        ValueError: group or running break their rule, or ``model`` holds another kind of BatchNorm (synchronised, 3-D,
            a class of one's own), which cannot be grouped; ``model`` is unchanged.
    """
    if group is not None:
        require_positive_int("set_bn_group", "group", group)
    require_choice("set_bn_group", "running", running, RUNNING)
    norms = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    other = next((type(norm).__name__ for _, _, norm in norms if plain_type(norm) is None), None)
    if other is not None and group is not None:
        raise ValueError(
            f"set_bn_group: model must hold no BatchNorm but BatchNorm1d, 2d and timm's BatchNormAct2d, got a {other}; "
            "use bn_group=None (--bn-group None)"
        )
    for parent, name, norm in norms:
        if plain_type(norm) is not None:
            setattr(parent, name, _twin(norm, group, running))


_GROUPED = {nn.BatchNorm1d: GroupBatchNorm1d, nn.BatchNorm2d: GroupBatchNorm2d}
_PLAIN = {grouped: plain for plain, grouped in _GROUPED.items()}


def plain_type(norm: _BatchNorm) -> type[_BatchNorm] | None:
    """The ungrouped class of ``norm``; None if it cannot be grouped."""
    if isinstance(norm, GroupBatchNormAct2d):
        return norm.plain
    kind = _PLAIN.get(type(norm), type(norm))
    timm = sys.modules.get("timm.layers")  # not imported: a network of timm is here only if timm is
    return kind if kind in _GROUPED or kind is getattr(timm, "BatchNormAct2d", None) else None


def _twin(old: _BatchNorm, group: int | None, running: str) -> _BatchNorm:
    plain = plain_type(old)
    options = {
        "eps": old.eps,
        "momentum": old.momentum,
        "affine": old.affine,
        "track_running_stats": old.track_running_stats,
        "device": "meta",  # its tensors are replaced below
    }
    if group is None:
        new = plain(old.num_features, **options)
    else:
        new = _GROUPED.get(plain, GroupBatchNormAct2d)(old.num_features, group, running, **options)
    if plain not in _GROUPED:
        new.plain, new.drop, new.act = plain, old.drop, old.act
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    return new.train(old.training)


def calibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Estimate the running statistics of every BatchNorm anew from a few unlabelled batches.

    Needed before features of a network with random weights are clustered: its running statistics are still (0, 1),
    and in eval mode nothing would be normalised. Each batch counts once, without groups: statistics of a whole batch
    are nearer to what eval mode applies. Dropout and the like stay in eval mode; modes, momentum and groups are
    restored afterwards; weights are not touched and no gradient is recorded.

    Args:
        model: on any device; batches are moved to it.
        batches: image tensors (B, 3, H, W); some hundred images in all are enough. They should be drawn at random,
            with the training or the test transform. A batch of one image has no variance and is passed over.

    Returns:
        Number of batches used.

    Raises:
        ValueError: no batch of two images or more; nothing is changed then.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    before = [(norm, norm.momentum, getattr(norm, "group_size", None)) for norm in norms]
    device = next(model.parameters()).device
    seen = 0
    try:
        model.eval()
        with torch.no_grad():
            for images in batches:
                if images.shape[0] < 2:
                    continue
                if seen == 0:
                    for norm, _, group in before:
                        norm.reset_running_stats()
                        norm.train()
                        norm.momentum = None  # cumulative average
                        if group is not None:
                            norm.group_size = sys.maxsize  # one group
                model(images.to(device))
                seen += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum, group in before:
            norm.momentum = momentum
            if group is not None:
                norm.group_size = group
    if seen == 0:
        raise ValueError("calibrate_batchnorm: batches must hold a batch of at least 2 images, got none")
    return seen

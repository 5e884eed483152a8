# SPDX-License-Identifier: Apache-2.0
"""The seams of a method: labels, order of images, loss, memory update.

``engine`` calls these in the order of the paper's algorithm and never asks which method it runs. The base class
is what all methods of the family share: k-reciprocal Jaccard distance, DBSCAN, identity-balanced batches. A method
overrides what its paper changes. A recipe sees images, features and camera ids; true identities never reach it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_u.config import Config


def center_per_camera(features: Tensor, camids: Tensor) -> Tensor:
    """``features`` (N, D) minus the mean of their camera's rows, rescaled to unit length.

    What a camera adds to all its images alike (colour cast, background) is removed, so that clusters need not be
    cameras. Assumes that cameras see a similar mix of people; where they do not, what those people share goes too.
    """
    centered = features.clone()
    for camid in camids.unique():
        rows = camids == camid
        centered[rows] -= features[rows].mean(dim=0)
    return F.normalize(centered, dim=1)


class Recipe(ABC):
    """One method's decisions. Subclass it, set ``name`` and ``Config``, override what differs.

    Args:
        config: the method's settings.
        camids: (N,) int64 camera of each training image, or None for data without cameras.

    Per epoch the engine calls ``label``, ``begin_epoch`` and ``order``; per step ``loss``, then, after backward and
    before the optimiser's step, ``update``. A recipe that keeps state over epochs returns it from ``state``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Config: ClassVar[type[Config]] = Config

    def __init__(self, config: Config, camids: Tensor | None) -> None:
        self.config = config
        self.camids = camids

    def label(self, features: Tensor, epoch: int) -> Tensor:
        """Pseudo-labels (N,) int64 of ``features`` (N, D), unit rows; -1 = un-clustered, left out this epoch.

        Rows that are not finite (images that could not be read) are un-clustered.
        """
        from fastreid_u.ops.pseudo_labels import pseudo_labels

        config = self.config
        readable = torch.isfinite(features).all(dim=1)
        used = features[readable]
        if config.center_per_camera and self.camids is not None:
            used = center_per_camera(used, self.camids[readable.cpu()].to(used.device))
        labels = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
        labels[readable] = pseudo_labels(
            used, eps=config.eps, min_samples=config.min_samples, k1=config.k1, k2=config.k2
        )
        return labels

    @abstractmethod
    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> None:
        """Build or refresh the memory from this epoch's ``features`` (N, D) and ``labels`` (N,)."""

    def order(self, labels: Tensor, epoch: int) -> Iterable[int]:
        """The epoch's stream of image indices; the loader cuts it in batches."""
        from fastreid_u.data.samplers import RandomMultipleGallery, iterations

        config = self.config
        camids = None if config.no_cam or self.camids is None else self.camids.tolist()
        sampler = RandomMultipleGallery(
            labels.tolist(), camids, num_instances=config.num_instances, seed=config.seed, epoch=epoch
        )
        if config.iters:
            return iterations(sampler, config.iters, config.batch_size)
        one_pass = list(sampler)  # the last batch is left out unless it is the only one
        return one_pass[: len(one_pass) // config.batch_size * config.batch_size] or one_pass

    @abstractmethod
    def loss(self, x: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
        """Scalar loss of network outputs ``x`` (B, D); ``indices`` (B,) are rows of the training set."""

    def update(self, x: Tensor, targets: Tensor, indices: Tensor) -> None:  # noqa: B027 - not every memory moves
        """Move the memory, after backward; it must not change what the gradient has read before."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that must survive between epochs; saved with every checkpoint."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most recipes keep nothing
        """Take back what ``state`` returned."""

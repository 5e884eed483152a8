# SPDX-License-Identifier: Apache-2.0
"""What every label generator does around its clustering: leaves out unreadable images, and centres cameras."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u._label_checks import require_clustering
from fastreid_u.config import Config
from fastreid_u.images import Images
from fastreid_u.ops.knn import knn


class Advice(NamedTuple):
    """What to try where labels teach nothing; sentences without a full stop."""

    no_cluster: str
    one_cluster: str


class LabelGenerator(nn.Module, ABC):
    """Makes the pseudo-labels of an epoch. A subclass defines ``cluster``, ``describe`` and ``advice``.

    Args:
        config: the run's settings; a generator reads those that it needs.
        images: the set to be labelled.

    What a generator keeps from epoch to epoch is a buffer, so that it is saved and restored with the recipe.
    """

    advice: ClassVar[Advice]

    def __init__(self, config: Config, images: Images) -> None:
        super().__init__()
        self.config = config
        self.images = images
        self._last: Tensor | None = None  # (count, k) int32 neighbours of last epoch by image, -1 for none; not saved

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """``knn`` of ``features`` (n, D), the rows of readable images, with the neighbours of last epoch as a hint.

        Memory kept: 4 k bytes an image, if features are on a CPU. A resumed run starts without; results do not change.
        """
        k, image = min(k, len(features)), self.images.readable.nonzero().flatten()
        if features.device.type != "cpu" or len(image) != len(features) or k == 0:
            return knn(features, k) if k else (features.new_zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64))
        hint = None
        if self._last is not None:
            row = torch.full((self.images.count + 1,), -1, dtype=torch.int32)  # the last for "none", which is -1
            row[image] = torch.arange(len(image), dtype=torch.int32)
            hint = row[self._last[image].long()]
        found = knn(features, k, hint=hint)
        self._last = torch.full((self.images.count, k), -1, dtype=torch.int32)
        self._last[image] = image[found[1]].int()
        return found

    def forward(self, features: Tensor, epoch: int) -> Tensor:
        """Labels (N,) int64, -1 or 0 .. C - 1, of ``features`` (N, D); unreadable images stay un-clustered."""
        readable, camids = self.images.readable, self.images.camids
        used = features[readable.to(features.device)]
        if self.config.center_per_camera and camids is not None:
            used = center_per_camera(used, camids[readable].to(used.device))
        labels = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
        found = require_clustering(
            "train", f"labels of {type(self).__name__}.cluster", self.cluster(used, epoch), len(used)
        )
        labels[readable.to(features.device)] = found.to(labels.device)
        return labels

    @abstractmethod
    def cluster(self, features: Tensor, epoch: int) -> Tensor:
        """Labels (n,), -1 or 0 .. C - 1, of ``features`` (n, D), the rows of readable images.

        A tensor, an array or a list of whole numbers, of any type; negative numbers all mean un-clustered. Another
        length, fractions, and numbers of 100,000 + 10 n or more are refused by name.
        """

    @abstractmethod
    def describe(self) -> str:
        """How labels are made, for the recipe card."""

    def scale(self) -> str:
        """What size of cluster the settings look for, beside the number of images, for the recipe card.

        Empty where a generator has nothing to compare.
        """
        return ""

    def settings(self, epoch: int) -> str:
        """The settings that decided the labels of ``epoch``, for errors and warnings."""
        return self.describe()


def neighbours_and_images(k1: int, images: int) -> str:
    """``scale`` of labels that are made from the ``k1`` nearest neighbours of each of ``images``."""
    people = max(images // k1, 1)
    return (
        f"k1 {k1}, {images:,} images: fits people of about {k1} images each, so about {people:,} of them; "
        "set k1 near the number of images that a person has"
    )


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

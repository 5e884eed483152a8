# SPDX-License-Identifier: Apache-2.0
"""The seams of a method: networks, views, features, labels, order of images, loss, memory update.

``engine`` calls these in the order of the papers' algorithms and never asks which method it runs. The base class is
what most methods of the family share: one network, one augmented view, k-reciprocal Jaccard distance, DBSCAN,
identity-balanced batches. A method overrides what its paper changes. A recipe sees images, features and camera ids;
true identities of the images that it learns to find never reach it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u.config import Config
from fastreid_u.ranks import label_group

if TYPE_CHECKING:
    from fastreid_u.data import View
    from fastreid_u.models import ReIDModel


@dataclass(frozen=True)
class Images:
    """What a recipe may know of a set of training images, in the order of the set.

    Attributes:
        count: N.
        camids: (N,) int64 cameras, or None for data without.
        pids: (N,) int64 identities 0 .. P - 1 of a labelled *source* set; None for the images to be learned.
    """

    count: int
    camids: Tensor | None = None
    pids: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a step sees; tensors on the training device.

    Attributes:
        views: one (B, 3, H, W) tensor for each of the recipe's ``views``, of the same B images.
        indices: (B,) int64 rows of the training set.
        targets: (B,) int64 of ``Recipe.targets`` at these rows (identities, in a source batch).
        camids: (B,) int64, or None for data without cameras.
        source: as many labelled images of the source set, where the method learns from one.
    """

    views: tuple[Tensor, ...]
    indices: Tensor
    targets: Tensor
    camids: Tensor | None = None
    source: "Batch | None" = None

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]


class Extract(Protocol):
    """Features of all training images, unaugmented, in eval mode; what ``Recipe.features`` is given."""

    def __call__(self, network: nn.Module, *, of: str = "target") -> Tensor:
        """(N, D) float32 rows of ``network`` for the "target" or the "source" images; NaN where unreadable."""


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


def balanced_batches(images: Images, labels: Tensor, config: Config, epoch: int, iters: int | None) -> list[list[int]]:
    """An epoch's batches, with ``num_instances`` images of each label (N,), from several cameras unless ``no_cam``.

    ``iters`` batches, or those of one pass for None: see ``iterations`` in data/samplers.py. Labels of -1 take no part.
    """
    from fastreid_u.data.samplers import RandomMultipleGallery, iterations

    camids = None if config.no_cam or images.camids is None else images.camids.tolist()
    sampler = RandomMultipleGallery(labels.tolist(), camids, config.num_instances, seed=config.seed, epoch=epoch)
    return iterations(sampler, iters, config.batch_size)


class Recipe(ABC):
    """One method's decisions. Subclass it, set ``name``, ``title`` and ``Config``, override what differs.

    Args:
        config: the method's settings.
        images: the set to learn.
        source: the labelled set to learn from as well, for methods that set ``uses_source``.

    Attributes:
        networks: everything with weights or buffers that must outlive an epoch; saved, restored, moved and put in
            training mode together. ``build`` fills it; ``networks["model"]`` is the engine's network, ``self.model``.

    Once: ``build``. Per epoch: ``features``, ``label``, ``begin_epoch``, ``targets``, ``batches``. Per step:
    ``forward``, ``loss``, then after backward ``update``, and after the optimiser's step ``after_step``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Config: ClassVar[type[Config]] = Config
    published: ClassVar[bool] = True  # False: a design or a reading of ours, with no published settings to depart from
    published_model: ClassVar[str] = "best"  # the epoch that published runs report: "best" on the test split, or "last"
    has_compat: ClassVar[bool] = False  # whether the recipe asks for ``config.compat``
    needs_cameras: ClassVar[bool] = False
    uses_source: ClassVar[bool] = False
    source_dials: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # of a source's reader, by name, unless the user says
    if_none_cluster: ClassVar[str] = "Raise eps, lower min_samples or k1, or start from better weights"
    if_all_cluster: ClassVar[str] = "Lower eps"

    def __init__(self, config: Config, images: Images, source: Images | None = None) -> None:
        self.config = config
        self.images = images
        self.source = source
        self.networks = nn.ModuleDict()
        if self.needs_cameras and images.camids is None:
            raise ValueError(f"train: method {self.name!r} needs images of two cameras or more")
        if self.uses_source and (source is None or source.pids is None):
            raise ValueError(f"train: method {self.name!r} needs source, a labelled data set to learn from, got none")

    @classmethod
    def is_published(cls) -> bool:
        """Whether there are published settings to depart from: not for a design of ours, nor for a user's subclass."""
        return cls.published and cls.__module__.startswith("fastreid_u.")

    @classmethod
    def describe_labels(cls, config: Config) -> str:
        """How labels are made, for the recipe card."""
        return f"k1 {config.k1}, k2 {config.k2}, eps {config.eps}, min_samples {config.min_samples}"

    def label_settings(self, epoch: int) -> str:
        """What decided this epoch's labels, for errors and warnings."""
        return f"eps {self.eps(epoch)}, min_samples {self.config.min_samples}, k1 {self.config.k1}"

    # What is trained, and what is looked at

    def build(self, model: "ReIDModel") -> None:
        """Take the network; add to ``networks`` what else the method trains, averages or remembers."""
        self.networks["model"] = model

    @property
    def model(self) -> "ReIDModel":
        """The network that was given to ``build``."""
        return self.networks["model"]

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [p for p in self.networks.parameters() if p.requires_grad]

    def ranked(self) -> Mapping[str, nn.Module]:
        """Networks to evaluate, by name; the one with the best mAP is saved. Each has the weights of a ReIDModel."""
        return {"model": self.model}

    def views(self) -> "tuple[View, ...]":
        """How a training image is shown: one transform for each tensor of ``Batch.views``, drawn independently."""
        from fastreid_u.data import train_transform

        c = self.config
        return (
            train_transform(c.height, c.width, erase=c.erase, color_jitter=c.color_jitter, pixel_norm=c.pixel_norm),
        )

    # Labels

    def features(self, extract: Extract, epoch: int) -> Tensor:
        """(N, D) rows to cluster; rows that are not finite (images that could not be read) stay un-clustered."""
        return extract(self.model)

    def label(self, features: Tensor, epoch: int) -> Tensor:
        """Pseudo-labels (N,) int64 of ``features`` (N, D); -1 = un-clustered."""
        readable = torch.isfinite(features).all(dim=1)
        used = features[readable]
        if self.config.center_per_camera and self.images.camids is not None:
            used = center_per_camera(used, self.images.camids[readable.cpu()].to(used.device))
        labels = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
        labels[readable] = self.cluster(used, epoch)
        return labels

    def cluster(self, features: Tensor, epoch: int) -> Tensor:
        """Labels (n,) int64, -1 or 0 .. C - 1, of ``features`` (n, D), all finite."""
        from fastreid_u.ops.pseudo_labels import pseudo_labels

        c = self.config
        return pseudo_labels(
            features, eps=self.eps(epoch), min_samples=c.min_samples, k1=c.k1, k2=c.k2, group=label_group()
        )

    def eps(self, epoch: int) -> float:
        """DBSCAN's radius in this epoch."""
        return self.config.eps

    @abstractmethod
    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> None:
        """Build or refresh the memory from this epoch's ``features`` (N, D) and ``labels`` (N,)."""

    def targets(self, labels: Tensor) -> Tensor:
        """(N,) int64: what each image is trained towards; -1 where it sits the epoch out."""
        return labels

    def batches(self, labels: Tensor, epoch: int) -> list[list[int]]:
        """The epoch's batches, each a list of image indices; ``labels`` are ``targets`` on the CPU."""
        return balanced_batches(self.images, labels, self.config, epoch, self.config.iters or None)

    # A step

    def forward(self, batch: Batch) -> Any:
        """Run the networks (under autocast, if on): a tensor, or a tuple of tensors, made float32 for ``loss``."""
        return self.model(batch.images)

    @abstractmethod
    def loss(self, x: Any, batch: Batch) -> Tensor:
        """Scalar loss of what ``forward`` gave."""

    def update(self, x: Any, batch: Batch) -> None:  # noqa: B027 - not every memory moves
        """Move the memory by detached ``x``, after backward; it must not change what the gradient has yet to read."""

    def after_step(self) -> None:  # noqa: B027 - only averaged teachers need it
        """Follow the networks, after the optimiser's step."""

    # Between epochs

    def state(self) -> dict[str, Tensor]:
        """Tensors beyond ``networks`` that must survive between epochs; saved with every checkpoint."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most recipes keep nothing
        """Take back what ``state`` returned."""

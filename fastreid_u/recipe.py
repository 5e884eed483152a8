# SPDX-License-Identifier: Apache-2.0
"""What a method is: a module that the engine trains without knowing which method it runs.

A recipe sees images, features and camera ids; true identities of the images that it learns to find never reach it. The
base class is what most methods of the family share: one network, one augmented view, DBSCAN's labels, identity-balanced
batches. A method overrides what its paper changes. In the order of the papers' algorithms the engine

1. makes the recipe, ``Method(config, images)``, which refuses what it cannot work with before any work is done;
2. hands it the network, ``build(model)``, and makes an optimiser of its trainable parameters;
3. in every epoch asks for ``features``, gives them to the label generator, ``labels(features, epoch)``, and both to
   ``begin_epoch``, whose targets it trains towards in ``batches``;
4. in every step runs the recipe itself (``forward``), then ``loss``, backward, the optimiser, and ``update``;
5. evaluates the networks that ``ranked`` names.

All that a step reads belongs to the module: networks and memories are submodules, tensors that ``begin_epoch`` makes
are buffers, and numbers that must last are extra state, a tensor of ``get_extra_state``. So ``state_dict`` and
``load_state_dict`` between any two steps save and restore the training. A buffer is registered in ``build`` and takes
the shape of what is loaded. Networks that the optimiser must not move are frozen with ``requires_grad_(False)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from fastreid_u.config import Config
from fastreid_u.images import Images
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.labels.generator import LabelGenerator

if TYPE_CHECKING:
    from fastreid_u.data import View
    from fastreid_u.models import ReIDModel


@dataclass(frozen=True)
class Batch:
    """What a step sees; tensors on the training device.

    Attributes:
        views: one (B, 3, H, W) tensor for each of the recipe's ``views``, of the same B images.
        indices: (B,) int64 rows of the training set.
        targets: (B,) int64, what ``Recipe.begin_epoch`` returned, at these rows (identities, in a source batch).
        camids: (B,) int64, or None for data without cameras.
        source: as many labelled images of the source set, where the method learns from one.
        epoch: the epoch of this step, for weights that depend on it.
    """

    views: tuple[Tensor, ...]
    indices: Tensor
    targets: Tensor
    camids: Tensor | None = None
    source: "Batch | None" = None
    epoch: int = 0

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from, and what is known of the runs that its authors published.

    Attributes:
        title: the method's name in tables and figures.
        published: whether there are published settings to depart from; False for a design or a reading of ours.
        model: the epoch that published runs report: "best" on the test split, or "last".
        compat: whether published code departs from the paper, so that ``config.compat`` makes a difference.
    """

    title: str
    published: bool = True
    model: str = "best"
    compat: bool = False


class Extract(Protocol):
    """Features of all training images, unaugmented, in eval mode; what ``Recipe.features`` is given."""

    def __call__(self, network: nn.Module, *, of: str = "target") -> Tensor:
        """(N, D) float32 rows of ``network`` for the "target" or the "source" images; NaN where unreadable.

        Which rows those are is from then on in ``Images.readable`` of the target, or of its source.
        """


def balanced_batches(images: Images, labels: Tensor, config: Config, epoch: int, iters: int | None) -> list[list[int]]:
    """An epoch's batches, with ``num_instances`` images of each label (N,), from several cameras unless ``no_cam``.

    ``iters`` batches, or those of one pass for None: see ``iterations`` in data/samplers.py. Labels of -1 take no part.
    """
    from fastreid_u.data.samplers import RandomMultipleGallery, iterations

    camids = None if config.no_cam or images.camids is None else images.camids.tolist()
    sampler = RandomMultipleGallery(labels.tolist(), camids, config.num_instances, seed=config.seed, epoch=epoch)
    return iterations(sampler, iters, config.batch_size)


class Recipe(nn.Module, ABC):
    """One method's decisions. Subclass it, set ``name`` and ``Config``, override what differs.

    Args:
        config: the method's settings. A method whose settings have a field ``source`` learns from a labelled set too.
        images: the set to learn, with that labelled set as ``images.source``.

    Attributes:
        name: what ``train(method=...)`` and a run's files call it.
        paper: where it comes from. A subclass that names no paper of its own is its author's design, titled ``name``.
        labels: the label generator; a method that labels otherwise sets another in ``__init__``.
        model: the network, from ``build`` on.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper] = Paper("", published=False)
    Config: ClassVar[type[Config]] = Config

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "paper" not in vars(cls):
            cls.paper = replace(cls.paper, title=getattr(cls, "name", cls.__name__), published=False)

    def __init__(self, config: Config, images: Images) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_take_shapes)
        self.config = config
        self.images = images
        self.labels: LabelGenerator = DBSCANLabels(config, images)
        if hasattr(config, "source") and (images.source is None or images.source.pids is None):
            raise ValueError(f"train: method {self.name!r} needs source, a labelled data set to learn from, got none")

    # What is trained, and what is looked at

    def build(self, model: "ReIDModel") -> None:
        """Take the network; make what else the method trains, averages or remembers."""
        self.model = model

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

    # An epoch

    def features(self, extract: Extract, epoch: int) -> Tensor:
        """(N, D) rows to cluster; those of unreadable images are not looked at."""
        return extract(self.model)

    @abstractmethod
    def begin_epoch(self, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Restart or refresh the memory from this epoch's ``features`` (N, D) and ``labels`` (N,).

        Returns:
            (N,) int64: what each image is trained towards, as a rule ``labels``; -1 where it sits the epoch out.
        """

    def batches(self, labels: Tensor, epoch: int) -> list[list[int]]:
        """The epoch's batches, each a list of image indices; ``labels`` are the targets, on the CPU."""
        return balanced_batches(self.images, labels, self.config, epoch, self.config.iters or None)

    # A step

    def forward(self, batch: Batch) -> Any:
        """Run the networks (under autocast, if on): a tensor, or a tuple of tensors, made float32 for ``loss``."""
        return self.model(batch.images)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Scalar loss of what ``forward`` gave; or terms by name, whose sum in their order is the loss."""

    def update(self, outputs: Any, batch: Batch) -> None:
        """After the optimiser's step, move memories by the detached ``outputs``, and teachers after their networks."""


def _take_shapes(recipe: Recipe, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Before loading, give the recipe's own buffers the shapes of those that are loaded."""
    for name, buffer in list(recipe.named_buffers(recurse=False)):
        found = state.get(prefix + name)
        if found is not None and found.shape != buffer.shape:
            setattr(recipe, name, buffer.new_empty(found.shape))

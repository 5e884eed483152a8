# SPDX-License-Identifier: Apache-2.0
"""A set of images: how they are read, the features that a network gives them, and those that cannot be read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastreid_u._text import visible
from fastreid_u.engine.allocator import keeping_freed_memory
from fastreid_u.engine.device import Machine
from fastreid_u.engine.display import Display

if TYPE_CHECKING:
    from fastreid_u.data import BadImage, Loaded, Sample, View

BAD_SHARE = 0.05  # past this share of unreadable images, the folder is more likely wrong than damaged


class TooManyBadImages(RuntimeError):
    """More than 5 % of a set's images cannot be read."""


class BadImageLog:
    """Reports each unreadable image once, also if other sets of the run hold it, and stops the run when there are too
    many of them.

    Args:
        total: images in the set.
        display: where the paths are named.
        share: what is too many; 1 never stops.
    """

    def __init__(self, total: int, display: Display, *, share: float = BAD_SHARE) -> None:
        self.total = total
        self.display = display
        self.share = share
        self.reasons: dict[str, str] = {}

    def note(self, bad: Iterable["BadImage"]) -> None:
        for image in bad:
            if image.path not in self.reasons:
                self.reasons[image.path] = image.reason
                self.display.once(f"warning: left out, cannot be read: {image.path} ({image.reason})")
        if len(self.reasons) > self.share * self.total:
            named = "\n".join(f"  {visible(path)}: {reason}" for path, reason in list(self.reasons.items())[:10])
            raise TooManyBadImages(
                f"{len(self.reasons)} of {self.total} images cannot be read, more than {self.share:.0%}; the first:\n"
                + named
            )


@dataclass(frozen=True)
class Reading:
    """How the images of a set are read.

    Attributes:
        view: the transform of an image as it is, for features.
        batch_size: images per batch of ``view``.
        train_views: the transforms under which a network is trained; None for sets that are only looked at.
        train_batch_size: images per batch of ``train_views``.
        workers: processes that decode; 0 decodes in this one.
        worker_start: how they start, as for ``make_loader``.
        truncated: use images whose file ends early, as far as they go.
        seed: seed of the random draws of transforms.
        cache: keep decoded pixels in memory, once for both kinds of batches: 3 * height * width bytes an image.
    """

    view: "View"
    batch_size: int
    train_views: "tuple[View, ...] | None" = None
    train_batch_size: int = 0
    workers: int = 0
    worker_start: str | None = None
    truncated: bool = False
    seed: int = 0
    cache: bool = False


class ImageSet:
    """Images that belong together, such as the training images or those of a test split.

    Args:
        samples: the images, in the order in which features have their rows.
        reading: how they are read.
        machine: where networks look at them.
        bad_share: the share of unreadable images that stops the run; 1 never stops it.

    Attributes:
        plain: the loader of the images as they are.
        augmented: the loader of ``reading.train_views``, or None without them.
        bad: the unreadable images met so far.
    """

    def __init__(
        self, samples: "Sequence[Sample]", reading: Reading, machine: Machine, *, bad_share: float = BAD_SHARE
    ) -> None:
        from fastreid_u.data import PixelCache, make_loader

        self.samples = samples
        self.machine = machine
        self.bad = BadImageLog(len(samples), machine.display, share=bad_share)
        height, width = reading.view.height, reading.view.width
        common = dict(
            workers=reading.workers,
            worker_start=reading.worker_start,
            truncated=reading.truncated,
            seed=reading.seed,
            cache=PixelCache(len(samples), height, width, shared=reading.workers > 0) if reading.cache else False,
            pin_memory=machine.device.type == "cuda",
        )
        self.plain = make_loader(samples, reading.view, batch_size=reading.batch_size, **common)
        self.augmented = None
        if reading.train_views is not None:
            self.augmented = make_loader(samples, reading.train_views, batch_size=reading.train_batch_size, **common)

    @torch.inference_mode()
    def features(self, network: nn.Module, phase: str = "extract") -> Tensor:
        """Features (N, D) float32 of all images, on the machine's device; rows of unreadable images are NaN.

        The network is put in eval mode and sees the images unaugmented; on a CPU a copy with its BatchNorms folded
        does. ``phase`` names the work in progress bars and errors. Holds 4 * N * D bytes, that copy and one batch.

        Raises:
            FloatingPointError: the network gives NaN or infinity for readable images (it has diverged).
            TooManyBadImages: more images than the set allows cannot be read.
            ValueError: none of them can.
        """
        from fastreid_u.models.folding import folded

        network.eval()
        device, count = self.machine.device, len(self.samples)
        features, unreadable = None, 0
        with keeping_freed_memory(device), self.machine.display.phase(phase, count) as advance:
            for loaded in self.plain:
                self.bad.note(loaded.bad)
                unreadable += len(loaded.bad)
                if len(loaded.indices):
                    images = loaded.images.to(device, non_blocking=True)
                    if features is None and device.type == "cpu":
                        network = folded(network, images)
                    with self.machine.precision():
                        rows = network(images).float()
                    if features is None:
                        features = torch.full((count, rows.shape[1]), torch.nan, dtype=torch.float32, device=device)
                    features[loaded.indices.to(device)] = rows
                advance(len(loaded.indices) + len(loaded.bad))
        if features is None:
            first = "".join(f", {visible(path)}: {reason}" for path, reason in list(self.bad.reasons.items())[:1])
            raise ValueError(f"{phase}: images must hold one that can be read, got {unreadable} that cannot{first}")
        _require_finite(features, unreadable, phase)
        return features

    def train_batches(self, batches: Sequence[Sequence[int]], seed: Sequence[int]) -> "Iterator[Loaded]":
        """Read ``batches`` of indices under the training views; unreadable images are left out and noted in ``bad``.

        The workers begin at once, before the first batch is asked for.
        """
        return self._noted(self.augmented.epoch(batches, seed=seed))

    def plain_batches(self, batches: Sequence[Sequence[int]]) -> "Iterator[Loaded]":
        """The same of the images as they are."""
        return self._noted(self.plain.epoch(batches))

    def _noted(self, batches: "Iterator[Loaded]") -> "Iterator[Loaded]":
        for loaded in batches:
            self.bad.note(loaded.bad)
            yield loaded

    def close(self) -> None:
        """End the worker processes now, even if an exception that is kept still refers to this set."""
        for loader in (self.plain, self.augmented):
            if loader is not None:
                loader.close()


def _require_finite(features: Tensor, unreadable: int, phase: str) -> None:
    """Only the rows of ``unreadable`` images may be NaN."""
    wrong = (~torch.isfinite(features).all(dim=1)).sum().item() - unreadable
    if wrong > 0:
        raise FloatingPointError(
            f"{phase}: features of {wrong} of {len(features)} images are NaN or infinite; the network has diverged. "
            "Lower lr, or use float32 (amp=off)"
        )

# SPDX-License-Identifier: Apache-2.0
"""What reads one batch, in this process or in a worker: files in, views out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fastreid_u._default_device import on_cpu
from fastreid_u.data.cache import PixelCache
from fastreid_u.data.images import BadImage, read_pixels
from fastreid_u.data.transforms import View


class Loaded(NamedTuple):
    """A batch that has been read.

    Attributes:
        images: (b, 3, H, W) float32; a tuple of such tensors where the loader has a tuple of views.
        indices: (b,) int64 into the loader's samples.
        bad: the images that could not be read; they are missing from ``images`` and ``indices``.
    """

    images: torch.Tensor | tuple[torch.Tensor, ...]
    indices: torch.Tensor
    bad: list[BadImage]

    @property
    def views(self) -> tuple[torch.Tensor, ...]:
        """``images`` as a tuple, also where there is one view."""
        return self.images if isinstance(self.images, tuple) else (self.images,)


class Task(NamedTuple):
    """All that is needed to read one image; workers hold no list of samples."""

    seed: tuple[int, ...]
    position: int
    index: int
    path: str


@dataclass(frozen=True)
class Reader:
    """Carries out the tasks of one batch.

    Attributes:
        views: what is made of each image.
        cache: decoded pixels, or None to decode each time.
        truncated: as for ``read_rgb``.
    """

    views: tuple[View, ...]
    cache: PixelCache | None
    truncated: bool

    @on_cpu()
    def __call__(self, tasks: Sequence[Task]) -> Loaded:
        views, indices, bad = [[] for _ in self.views], [], []
        for task in tasks:
            try:
                pixels = self._pixels(task)
            except BadImage as error:
                bad.append(BadImage(error.path, error.reason))  # without the traceback and the frames it holds
                continue
            rng = np.random.default_rng((*task.seed, task.position))
            for images, view in zip(views, self.views, strict=True):
                images.append(view(pixels, rng))
            indices.append(task.index)
        empty = torch.empty(0, 3, self.views[0].height, self.views[0].width, dtype=torch.float32)
        stacked = tuple(torch.stack(images) if images else empty for images in views)
        return Loaded(stacked if len(stacked) > 1 else stacked[0], torch.tensor(indices, dtype=torch.int64), bad)

    def _pixels(self, task: Task) -> torch.Tensor:
        if self.cache is not None:
            return self.cache.get(task.index, task.path, truncated=self.truncated)
        return read_pixels(task.path, self.views[0].height, self.views[0].width, truncated=self.truncated)

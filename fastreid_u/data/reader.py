# SPDX-License-Identifier: Apache-2.0
"""What reads one batch, in this process or in a worker: files in, views out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fastreid_u._default_device import on_cpu
from fastreid_u.data.cache import PixelCache
from fastreid_u.data.images import BadImage, read_pixels
from fastreid_u.data.transforms import View
from fastreid_u.data.written_views import written


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
    def __call__(self, tasks: Sequence[Task], empty: Callable[..., torch.Tensor] = torch.empty) -> Loaded:
        """``empty`` makes room for a batch, as ``torch.empty`` does."""
        first, forms = self.views[0], [written(view) for view in self.views]
        shape = (3, first.height, first.width)
        rooms = [form and empty(len(tasks), *shape, dtype=torch.float32) for form in forms]
        places = [room is not None and room.numpy() for room in rooms]
        lists, indices, bad = [[] for _ in forms], [], []
        draws = any(form is None or form.draws for form in forms)
        for task in tasks:
            try:
                pixels = self._pixels(task)
            except BadImage as error:
                bad.append(BadImage(error.path, error.reason))  # without the traceback and the frames it holds
                continue
            rng = np.random.default_rng((*task.seed, task.position)) if draws else None
            for view, form, place, images in zip(self.views, forms, places, lists, strict=True):
                if form is None:
                    images.append(view(pixels, rng))
                else:
                    form.write(pixels, rng, place[len(indices)])
            indices.append(task.index)
        count = len(indices)
        for number, (room, images) in enumerate(zip(rooms, lists, strict=True)):
            if room is None:
                rooms[number] = torch.stack(images) if images else torch.empty(0, *shape, dtype=torch.float32)
            elif count < len(tasks):
                rooms[number] = room[:count].clone()
        return Loaded(tuple(rooms) if len(rooms) > 1 else rooms[0], torch.tensor(indices, dtype=torch.int64), bad)

    def _pixels(self, task: Task) -> torch.Tensor:
        if self.cache is not None:
            return self.cache.get(task.index, task.path, truncated=self.truncated)
        return read_pixels(task.path, self.views[0].height, self.views[0].width, truncated=self.truncated)

# SPDX-License-Identifier: Apache-2.0
"""Batches of views of given images, the same whatever the number of worker processes."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastreid_u._checks import one_or_more, require_int_at_least
from fastreid_u.data.cache import PixelCache
from fastreid_u.data.dataset import Sample
from fastreid_u.data.images import BadImage, read_pixels
from fastreid_u.data.transforms import View

# A forked worker needs no script to run again, so that scripts without a __main__ guard work whatever Python's default
# is. It is sound here: workers decode on one thread (the DataLoader sees to that) and never touch a GPU. macOS is not
# safe to fork, Windows cannot: there Python's default holds.
_START = "fork" if sys.platform == "linux" else None


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


class _Task(NamedTuple):
    """All that a worker receives of one image; workers hold no list of samples."""

    seed: tuple[int, ...]
    position: int
    index: int
    path: str


class _Reader:
    """Runs in the workers: carries out the tasks of one batch."""

    def __init__(self, views: tuple[View, ...], cache: PixelCache | None) -> None:
        self.views = views
        self.cache = cache

    def __getitems__(self, tasks: list[_Task]) -> Loaded:
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

    def _pixels(self, task: _Task) -> torch.Tensor:
        if self.cache is not None:
            return self.cache.get(task.index, task.path)
        return read_pixels(task.path, self.views[0].height, self.views[0].width)


def chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """``indices`` cut into batches of ``size``, in their order; the last may be shorter.

    >>> chunks([3, 1, 4, 1, 5], 2)
    [[3, 1], [4, 1], [5]]
    """
    return [indices[i : i + size] for i in range(0, len(indices), size)]


class _Epoch:
    """The batch sampler of the DataLoader: what is left of an epoch's batches, and this rank's share of each."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.batches: Sequence[Sequence[int]] = ()
        self.seed: tuple[int, ...] = ()
        self.start = 0
        self.share = (0, 1)

    def __iter__(self) -> Iterator[list[_Task]]:
        rank, ranks = self.share
        first = sum(len(self.batches[number]) for number in range(self.start))  # position in the epoch's stream
        for number in range(self.start, len(self.batches)):
            batch = self.batches[number]
            part = range(len(batch) * rank // ranks, len(batch) * (rank + 1) // ranks)
            yield [self._task(first + place, int(batch[place])) for place in part]
            first += len(batch)

    def _task(self, position: int, index: int) -> _Task:
        if not 0 <= index < len(self.paths):
            raise IndexError(f"make_loader: batches must hold indices in [0, {len(self.paths)}), got {index}")
        return _Task(self.seed, position, index, self.paths[index])


class ReIDLoader:
    """Reads batches of ``samples``; made by ``make_loader``. Worker processes start once and live until ``close`` or as
    long as the loader.

    ``for loaded in loader`` runs through all samples in their order, in ``len(loader)`` batches;
    ``loader.epoch(batches, seed=...)`` through any others. One epoch at a time: starting the next ends the one before.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        views: tuple[View, ...],
        *,
        batch_size: int,
        workers: int,
        seed: int | Sequence[int],
        cache: PixelCache | None,
        pin_memory: bool,
    ) -> None:
        self.cache = cache
        self.seed = seed
        self._in_order = chunks(range(len(samples)), batch_size)
        self._epoch = _Epoch([sample.path for sample in samples])
        self._batches = DataLoader(
            _Reader(views, cache),
            batch_sampler=self._epoch,
            collate_fn=_as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=_START if workers > 0 else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so that an epoch does not advance torch's global generator
        )

    def epoch(
        self,
        batches: Sequence[Sequence[int]] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Loaded]:
        """Read ``batches`` one after the other, beginning at once.

        Args:
            batches: each a sequence of indices into the samples; None for all samples in their order.
            seed: of this epoch's random draws, one or several non-negative integers; None for the loader's.
            start: number of batches to leave out, as a resumed epoch does.
            share: ``(rank, ranks)``: of each batch the contiguous part of this rank; sizes differ by one at most.

        The draws for an image depend on ``seed`` and on its position in the stream of all batches alone, so any start
        and any share give the same pictures.

        Raises:
            ValueError: a start or a share that is none. IndexError: an index without a sample, where its batch is due.
        """
        batches = self._in_order if batches is None else batches
        seed = self.seed if seed is None else seed
        if not 0 <= start <= len(batches):
            raise ValueError(f"make_loader: start must lie in [0, {len(batches)}], got {start}")
        if not 0 <= share[0] < share[1]:
            raise ValueError(f"make_loader: share must be (rank, ranks) with 0 <= rank < ranks, got {share}")
        self._epoch.batches, self._epoch.start, self._epoch.share = batches, start, share
        self._epoch.seed = _numbers(seed)
        try:
            return iter(self._batches)
        except RuntimeError as error:
            if "bootstrapping" not in str(error):
                raise
            raise RuntimeError(
                "make_loader: workers must be started by a script that is guarded by `if __name__ == '__main__':`, got "
                "none, and worker processes run an unguarded script once more; or use workers=0"
            ) from None

    def close(self) -> None:
        """End the worker processes now, even if something still refers to the loader, as a kept exception may.

        A later epoch starts new ones.
        """
        running, self._batches._iterator = self._batches._iterator, None
        if running is not None:
            running._shutdown_workers()

    def __len__(self) -> int:
        """Number of batches of ``for loaded in loader``."""
        return len(self._in_order)

    def __iter__(self) -> Iterator[Loaded]:
        return self.epoch()


def _numbers(seed: object) -> tuple[int, ...]:
    """A seed of one or several numbers, of any integer type."""
    seeds = one_or_more("make_loader", "seed", seed)[0]
    return tuple(require_int_at_least("make_loader", "seed", each, 0) for each in seeds)


def _as_is(loaded: Loaded) -> Loaded:
    return loaded


def make_loader(
    samples: Sequence[Sample],
    transform: View | tuple[View, ...],
    *,
    batch_size: int,
    workers: int = 0,
    seed: int | Sequence[int] = 0,
    cache: bool | PixelCache = False,
    pin_memory: bool = False,
) -> ReIDLoader:
    """Read, transform and batch images.

    Args:
        samples: what batches and ``Loaded.indices`` count.
        transform: a view, or a tuple of views of equal size that are drawn independently from one decoded image.
        batch_size: images per batch where the loader runs through the samples in their order. A batch that is read has
            fewer images where some cannot be read.
        workers: processes that decode, at most one per CPU that this process may use; 0 decodes in this one. Results
            are bit-identical for every number.
        seed: one or several non-negative integers, for example (seed, epoch).
        cache: keep decoded pixels, True or a ``PixelCache`` shared with another loader over the same samples.
        pin_memory: batches in page-locked memory, for copies to a GPU.

    Returns:
        A ``ReIDLoader``. An unreadable image never raises: it is reported in ``Loaded.bad`` each time it is met.
    """
    views = transform if isinstance(transform, tuple) else (transform,)
    if not views or len({(view.height, view.width) for view in views}) != 1:
        raise ValueError("make_loader: transform must be one view or several of equal size, got " + repr(transform))
    if batch_size < 1:
        raise ValueError(f"make_loader: batch_size must be positive, got {batch_size}")
    if workers < 0:
        raise ValueError(f"make_loader: workers must not be negative, got {workers}")
    if hasattr(os, "sched_getaffinity"):
        workers = min(workers, len(os.sched_getaffinity(0)))
    size = (views[0].height, views[0].width)
    if cache is True:
        cache = PixelCache(len(samples), *size, shared=workers > 0)
    if isinstance(cache, PixelCache):
        if cache.pixels.shape != (len(samples), 3, *size):
            want, got = (len(samples), 3, *size), tuple(cache.pixels.shape)
            raise ValueError(f"make_loader: cache must have the shape {want} of these samples, got {got}")
        if workers > 0 and not cache.pixels.is_shared():
            raise ValueError("make_loader: cache must be shared=True for workers > 0, got a private one")
    return ReIDLoader(
        samples,
        views,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        cache=cache or None,
        pin_memory=pin_memory,
    )

# SPDX-License-Identifier: Apache-2.0
"""Batches of views, in an order given from outside, the same whatever the number of worker processes."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastreid_u.data.dataset import Sample
from fastreid_u.data.images import BadImage, read_pixels
from fastreid_u.data.transforms import View

# A forked worker needs no script to run again, so that scripts without a __main__ guard work whatever Python's default
# is. It is sound here: workers decode on one thread (the DataLoader sees to that) and never touch a GPU. macOS is not
# safe to fork, Windows cannot: there Python's default holds.
_START = "fork" if sys.platform == "linux" else None


class Batch(NamedTuple):
    """Attributes:
    images: (b, 3, H, W) float32; a tuple of such tensors where the loader has a tuple of views.
    indices: (b,) int64 into the loader's samples.
    bad: the images that could not be read; they are missing from ``images`` and ``indices``.
    """

    images: torch.Tensor | tuple[torch.Tensor, ...]
    indices: torch.Tensor
    bad: list[BadImage]


class PixelCache:
    """Decoded and resized images in memory, filled as they are first read.

    ``num * 3 * height * width`` bytes: Market-1501's training set takes 1.3 GB at 256 x 128 and 0.3 GB at 128 x 64.
    Give one cache to every loader over the same samples at the same size. With ``shared`` it lies in shared memory,
    where worker processes fill it together. Two of them may decode the same image at the same time; both write the
    same bytes, and the mark that says "ready" is set after them.

    Raises:
        MemoryError: shared memory (``/dev/shm``, small by default in containers) cannot hold it.
    """

    def __init__(self, num: int, height: int, width: int, *, shared: bool = False) -> None:
        if shared:
            _require_shared_memory(num * 3 * height * width)
        self.pixels = torch.empty(num, 3, height, width, dtype=torch.uint8)  # untouched pages cost nothing yet
        self.ready = torch.zeros(num, dtype=torch.bool)
        if shared:
            self.pixels.share_memory_()
            self.ready.share_memory_()

    def get(self, index: int, path: str) -> torch.Tensor:
        """(3, height, width) uint8 of image ``index``, decoded from ``path`` the first time."""
        if not self.ready[index]:
            self.pixels[index] = read_pixels(path, *self.pixels.shape[-2:])
            self.ready[index] = True
        return self.pixels[index]


def _require_shared_memory(needed: int) -> None:
    if os.path.isdir("/dev/shm"):  # elsewhere shared memory has no such limit
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise MemoryError(
                f"make_loader: cache must fit into shared memory, got {needed / 1e9:.2f} GB for {free / 1e9:.2f} GB "
                "free in /dev/shm; use workers=0, cache=False, or more (docker run --shm-size)"
            )


class _Order(NamedTuple):
    """All that a worker is told about one image; workers hold no list of samples."""

    seed: tuple[int, ...]
    position: int
    index: int
    path: str


class _Reader:
    """Runs in the workers: carries out the orders of one batch."""

    def __init__(self, views: tuple[View, ...], cache: PixelCache | None) -> None:
        self.views = views
        self.cache = cache

    def __getitems__(self, orders: list[_Order]) -> Batch:
        views, indices, bad = [[] for _ in self.views], [], []
        for order in orders:
            try:
                pixels = self._pixels(order)
            except BadImage as error:
                bad.append(BadImage(error.path, error.reason))  # without the traceback and the frames it holds
                continue
            rng = np.random.default_rng((*order.seed, order.position))
            for images, view in zip(views, self.views, strict=True):
                images.append(view(pixels, rng))
            indices.append(order.index)
        empty = torch.empty(0, 3, self.views[0].height, self.views[0].width, dtype=torch.float32)
        stacked = tuple(torch.stack(images) if images else empty for images in views)
        return Batch(stacked if len(stacked) > 1 else stacked[0], torch.tensor(indices, dtype=torch.int64), bad)

    def _pixels(self, order: _Order) -> torch.Tensor:
        if self.cache is not None:
            return self.cache.get(order.index, order.path)
        return read_pixels(order.path, self.views[0].height, self.views[0].width)


class _Chunks:
    """The batch sampler of the DataLoader: the current epoch's order, cut into batches."""

    def __init__(self, paths: list[str], batch_size: int, drop_last: bool) -> None:
        self.paths = paths
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.order: Iterable[int] = ()
        self.seed: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[list[_Order]]:
        chunk: list[_Order] = []
        for position, index in enumerate(self.order):
            index = int(index)
            if not 0 <= index < len(self.paths):
                raise IndexError(f"make_loader: order must hold indices in [0, {len(self.paths)}), got {index}")
            chunk.append(_Order(self.seed, position, index, self.paths[index]))
            if len(chunk) == self.batch_size:
                yield chunk
                chunk = []
        if chunk and not self.drop_last:
            yield chunk


class ReIDLoader:
    """Batches over ``samples``; made by ``make_loader``. Worker processes start once and live until ``close`` or as
    long as the loader.

    ``for batch in loader`` runs the order and seed given at construction; ``loader.epoch(order, seed)`` any other.
    One epoch at a time: starting the next ends the one before.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        views: tuple[View, ...],
        *,
        batch_size: int,
        order: Iterable[int] | None,
        workers: int,
        seed: int | Sequence[int],
        cache: PixelCache | None,
        drop_last: bool,
        pin_memory: bool,
    ) -> None:
        self.cache = cache
        self.seed = seed
        self.order = range(len(samples)) if order is None else order
        self._chunks = _Chunks([sample.path for sample in samples], batch_size, drop_last)
        self._batches = DataLoader(
            _Reader(views, cache),
            batch_sampler=self._chunks,
            collate_fn=_as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=_START if workers > 0 else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so that an epoch does not advance torch's global generator
        )

    def epoch(self, order: Iterable[int] | None = None, seed: int | Sequence[int] | None = None) -> Iterator[Batch]:
        """One run through ``order`` (indices into the samples, any iterable, cut into batches as it comes).

        The random draws for the image at position p of the stream depend on ``seed`` and p alone.
        """
        seed = self.seed if seed is None else seed
        self._chunks.order = self.order if order is None else order
        self._chunks.seed = (seed,) if isinstance(seed, int) else tuple(int(s) for s in seed)
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
        """End the worker processes now, whoever still holds the loader (an exception's traceback in a notebook, say).

        A later epoch starts new ones.
        """
        running, self._batches._iterator = self._batches._iterator, None
        if running is not None:
            running._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()


def _as_is(batch: Batch) -> Batch:
    return batch


def make_loader(
    samples: Sequence[Sample],
    transform: View | tuple[View, ...],
    *,
    batch_size: int,
    order: Iterable[int] | None = None,
    workers: int = 0,
    seed: int | Sequence[int] = 0,
    cache: bool | PixelCache = False,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> ReIDLoader:
    """Read, transform and batch images.

    Args:
        samples: what ``order`` and ``Batch.indices`` count.
        transform: a view, or a tuple of views of equal size that are drawn independently from one decoded image.
        batch_size: indices per batch; a batch has fewer images where some cannot be read.
        order: indices, default 0..n-1; an iterable that can be run only once serves one epoch.
        workers: processes that decode, at most one per CPU that this process may use; 0 decodes in this one. Results
            are bit-identical for every number.
        seed: one or several non-negative integers, for example (seed, epoch, rank).
        cache: keep decoded pixels, True or a ``PixelCache`` shared with another loader over the same samples.
        drop_last: leave out a last batch that is not full.
        pin_memory: batches in page-locked memory, for copies to a GPU.

    Returns:
        A ``ReIDLoader``. An unreadable image never raises: it is reported in ``Batch.bad`` each time it is met.
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
        order=order,
        workers=workers,
        seed=seed,
        cache=cache or None,
        drop_last=drop_last,
        pin_memory=pin_memory,
    )

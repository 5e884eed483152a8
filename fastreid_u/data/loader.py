# SPDX-License-Identifier: Apache-2.0
"""Batches of views of given images, the same whatever the number of worker processes."""

import multiprocessing
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import TypeVar

import numpy as np

from fastreid_u.data.cache import PixelCache
from fastreid_u.data.dataset import Sample
from fastreid_u.data.reader import Loaded, Reader, Task
from fastreid_u.data.transforms import View
from fastreid_u.data.workers import START_METHODS, Flight, Workers

Result = TypeVar("Result")


def chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """``indices`` cut into batches of ``size``, in their order; the last may be shorter.

    >>> chunks([3, 1, 4, 1, 5], 2)
    [[3, 1], [4, 1], [5]]
    """
    return [indices[i : i + size] for i in range(0, len(indices), size)]


class _Plan:
    """The tasks of an epoch's batches; of each batch those of this rank."""

    def __init__(
        self, paths: list[str], batches: Sequence[Sequence[int]], seed: tuple[int, ...], share: tuple[int, int]
    ) -> None:
        for batch in batches:
            _require_indices(batch, len(paths))
        self.paths = paths
        self.batches = batches
        self.seed = seed
        self.share = share
        self.first = list(accumulate((len(batch) for batch in batches), initial=0))  # position in the epoch's stream

    def tasks(self, number: int) -> list[Task]:
        """Those of batch ``number``."""
        batch, (rank, ranks) = self.batches[number], self.share
        part = range(len(batch) * rank // ranks, len(batch) * (rank + 1) // ranks)
        first = self.first[number]
        indices = [(place, operator.index(batch[place])) for place in part]
        return [Task(self.seed, first + place, index, self.paths[index]) for place, index in indices]

    @property
    def largest(self) -> int:
        """Images of the largest share of a batch."""
        return max((-(-len(batch) // self.share[1]) for batch in self.batches), default=0)


class _Epoch(Iterator[Loaded]):
    """One run through batches. Those that no worker reads for it are read in this process when they are due."""

    def __init__(self, loader: "ReIDLoader", plan: _Plan, start: int) -> None:
        self._loader = loader
        self._plan = plan
        self._next = start
        self._ahead, self._flight = loader._read_ahead(plan, start)

    def __len__(self) -> int:
        """Number of batches that are left."""
        return len(self._plan.batches) - self._next

    def __next__(self) -> Loaded:
        if not len(self):
            if self._flight is not None:
                self._flight.end()
            raise StopIteration
        if self._flight is None or self._loader._flight is not self._flight:  # the workers serve another epoch
            self._flight = self._ahead = None
            loaded = self._loader._read(self._plan.tasks(self._next))
        else:
            loaded = self._loader._receive(self._ahead)
        self._next += 1
        return loaded


class ReIDLoader:
    """Reads batches of ``samples``; made by ``make_loader``. Worker processes start once and live until ``close`` or as
    long as the loader.

    ``for loaded in loader`` runs through all samples in their order, in ``len(loader)`` batches;
    ``loader.epoch(batches, seed=...)`` through any others. Epochs do not disturb each other: workers serve the one that
    was begun last, and one before it that is still read goes on in this process, with the same pictures.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: Reader,
        *,
        batch_size: int,
        seed: tuple[int, ...],
        workers: Workers | None,
        pin_memory: bool,
    ) -> None:
        self.cache = reader.cache
        self.seed = seed
        self._paths = [sample.path for sample in samples]
        self._in_order = chunks(range(len(samples)), batch_size)
        self._reader = reader
        self._workers = workers
        self._pin_memory = pin_memory
        self._flight: Flight | None = None  # that of the epoch which the workers serve
        self._may_read_ahead = True

    def epoch(
        self,
        batches: Sequence[Sequence[int]] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Loaded]:
        """Read ``batches`` one after the other, beginning at once; ``len`` of it is the number of batches left.

        Args:
            batches: each a sequence of indices into the samples; None for all samples in their order.
            seed: of this epoch's random draws, one or several non-negative integers; None for the loader's.
            start: number of batches to leave out, as a resumed epoch does.
            share: ``(rank, ranks)``: of each batch the contiguous part of this rank; sizes differ by one at most.

        The draws for an image depend on ``seed`` and on its position in the stream of all batches alone, so any start
        and any share give the same pictures.

        Raises:
            ValueError: a start, a share or a seed that is none. IndexError: an index without a sample. TypeError: an
                index or a seed that is no integer.
            MemoryError: a worker got no shared memory. RuntimeError: a worker died. TimeoutError: none delivered a
                batch within ``$FASTREID_U_WORKER_TIMEOUT`` seconds, by default 600. The last three come while reading.
        """
        batches = self._in_order if batches is None else batches
        seed = self.seed if seed is None else _seed(seed)
        if not 0 <= start <= len(batches):
            raise ValueError(f"make_loader: start must lie in [0, {len(batches)}], got {start}")
        if not 0 <= share[0] < share[1]:
            raise ValueError(f"make_loader: share must be (rank, ranks) with 0 <= rank < ranks, got {share}")
        return _Epoch(self, _Plan(self._paths, batches, seed, share), start)

    def close(self) -> None:
        """End the worker processes now, even if something still refers to the loader, as a kept exception may.

        A later epoch starts new ones; one that is being read goes on in this process.
        """
        self._land()
        if self._workers is not None:
            self._workers.close()

    def _land(self) -> None:
        """Take the workers from the epoch that they serve."""
        if self._flight is not None:
            self._flight.end()
            self._flight = None

    def __len__(self) -> int:
        """Number of batches of ``for loaded in loader``."""
        return len(self._in_order)

    def __iter__(self) -> Iterator[Loaded]:
        return self.epoch()

    def _read_ahead(self, plan: _Plan, start: int) -> tuple[Iterator[Loaded] | None, Flight | None]:
        """What workers read of ``plan`` from now on, and the shared memory set aside for it; nothing without room.

        A loader that found no room once does not try again, so that it warns once.
        """
        self._land()
        if self._workers is None or not self._may_read_ahead:
            return None, None
        view = self._reader.views[0]
        image = len(self._reader.views) * 3 * view.height * view.width * 4  # bytes
        self._flight = flight = self._workers.room_for(plan.largest * image)
        if flight is None:
            self._may_read_ahead = False
            self._workers.close()
            return None, None
        left = (plan.tasks(number) for number in range(start, len(plan.batches)))
        return self._or_close(lambda: self._workers.begin(left)), flight

    def _receive(self, ahead: Iterator[Loaded]) -> Loaded:
        return self._or_close(lambda: next(ahead))

    def _or_close(self, action: Callable[[], Result]) -> Result:
        """After an error the workers are of no use, neither to this epoch, should it be read on, nor to the next."""
        with ExitStack() as on_error:
            on_error.callback(self.close)
            result = action()
            on_error.pop_all()
            return result

    def _read(self, tasks: list[Task]) -> Loaded:
        loaded = self._reader(tasks)
        if not self._pin_memory:
            return loaded
        pinned = [images.pin_memory() for images in loaded.views]
        return loaded._replace(
            images=tuple(pinned) if isinstance(loaded.images, tuple) else pinned[0], indices=loaded.indices.pin_memory()
        )


def _require_indices(batch: Sequence[int], count: int) -> None:
    """Each index of ``batch`` is a whole number that counts one of ``count`` samples."""
    numbers = np.asarray(batch)
    if numbers.size == 0:
        return
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise TypeError(f"make_loader: batches must hold lists of integers, got {numbers.dtype} in {batch!r:.80}")
    for index in (int(numbers.min()), int(numbers.max())):
        if not 0 <= index < count:
            raise IndexError(f"make_loader: batches must hold indices in [0, {count}), got {index}")


def _seed(seed: int | Sequence[int]) -> tuple[int, ...]:
    """``seed`` as a tuple of Python's integers."""
    try:
        numbers = (operator.index(seed),) if np.ndim(seed) == 0 else tuple(operator.index(part) for part in seed)
    except TypeError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        raise ValueError(f"make_loader: seed must be one or several integers of 0 or more, got {seed!r}")
    return numbers


def make_loader(
    samples: Sequence[Sample],
    transform: View | tuple[View, ...],
    *,
    batch_size: int,
    workers: int = 0,
    worker_start: str | None = None,
    seed: int | Sequence[int] = 0,
    cache: bool | PixelCache = False,
    truncated: bool = False,
    pin_memory: bool = False,
) -> ReIDLoader:
    """Read, transform and batch images.

    Args:
        samples: what batches and ``Loaded.indices`` count.
        transform: a view, or a tuple of views of equal size that are drawn independently from one decoded image.
        batch_size: images per batch where the loader runs through the samples in their order. A batch that is read has
            fewer images where some cannot be read.
        workers: processes that decode, at most one per CPU that this process may use; 0 decodes in this one. Results
            are bit-identical for every number. Each reads two batches ahead into shared memory; where these do not
            fit, a warning is given and this process reads.
        worker_start: "fork", "forkserver" or "spawn", as ``multiprocessing`` has them, with the same results. None =
            fork on Linux, else Python's default. The other two need a picklable transform and a script with a
            ``__main__`` guard, and are safe where other threads hold locks at the moment of a fork. Steps that draw
            from torch's global generator, which they should not, need them in a process with threads.
        seed: one or several non-negative integers, for example (seed, epoch).
        cache: keep decoded pixels, True or a ``PixelCache`` shared with another loader over the same samples.
        truncated: also use images whose file ends early, as far as they go (``read_rgb``).
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
    if worker_start is not None and worker_start not in multiprocessing.get_all_start_methods():
        known = ", ".join(name for name in START_METHODS if name in multiprocessing.get_all_start_methods())
        raise ValueError(f"make_loader: worker_start must be one of {known}, or None, got {worker_start!r}")
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
    reader = Reader(views, cache or None, truncated)
    return ReIDLoader(
        samples,
        reader,
        batch_size=batch_size,
        seed=_seed(seed),
        workers=Workers(reader, workers, worker_start, pin_memory=pin_memory) if workers > 0 else None,
        pin_memory=pin_memory,
    )

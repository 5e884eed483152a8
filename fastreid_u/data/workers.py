# SPDX-License-Identifier: Apache-2.0
"""Processes that read batches ahead of their use: torch's DataLoader, with an end to every wait for a worker.

What a worker cannot hand over for want of shared memory, and a worker that dies or delivers nothing, end in an error.
"""

import contextlib
import os
import pickle
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastreid_u._default_device import on_cpu
from fastreid_u.data.contexts import context
from fastreid_u.data.reader import Loaded, Reader, Task
from fastreid_u.data.shared_memory import free_shared_memory

START_METHODS = ("fork", "forkserver", "spawn")
TIMEOUT_VARIABLE = "FASTREID_U_WORKER_TIMEOUT"
_SECONDS = 600.0
_AHEAD = 2  # batches that each worker reads ahead


class Workers(DataLoader):
    """Processes that carry out the tasks of batches; they start with the first ``begin`` and live until ``close``.

    Args:
        reader: what each of them runs.
        count: how many; 1 or more.
        start: one of ``START_METHODS``, or None for fork on Linux and Python's default elsewhere. A forked worker needs
            no script to run again, so that scripts without a __main__ guard work. macOS is not safe to fork, Windows
            cannot.
        pin_memory: batches in page-locked memory.
    """

    def __init__(self, reader: Reader, count: int, start: str | None, *, pin_memory: bool) -> None:
        self.seconds = _timeout()
        self._start = start or ("fork" if sys.platform == "linux" else None)
        self._queued = _Queued()
        super().__init__(
            _InWorker(reader),
            batch_sampler=self._queued,
            collate_fn=_as_is,
            worker_init_fn=_ignore_interrupts,
            num_workers=count,
            prefetch_factor=_AHEAD,
            persistent_workers=True,
            multiprocessing_context=context(self._start),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so that an epoch does not advance torch's global generator
        )

    def begin(self, batches: Iterable[list[Task]]) -> Iterator[Loaded]:
        """Read ``batches``, beginning at once; the batches of an earlier call are forgotten."""
        self._queued.batches = batches
        try:
            with on_cpu():
                return iter(self)
        except RuntimeError as error:
            if "bootstrapping" not in str(error):
                raise
            raise RuntimeError(
                "make_loader: workers must be started by a script that is guarded by `if __name__ == '__main__':`, got "
                "none, and worker processes run an unguarded script once more; or use workers=0"
            ) from None
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if self._start == "fork":
                raise
            raise TypeError(
                f"make_loader: transform must be picklable for workers that are not forked, got {error}; use "
                "worker_start='fork' or workers=0"
            ) from error

    def room_for(self, largest: int) -> "Flight | None":
        """A place in shared memory for batches of ``largest`` bytes on their way; None where too little is free.

        Two are counted for the receiver: the one in use and the one before it.
        """
        return Flight.of(largest * (_AHEAD * self.num_workers + 2), self.num_workers)

    def _get_iterator(self) -> "_Deliveries":
        return _Deliveries(self)

    def close(self) -> None:
        """End the processes. A later ``begin`` starts new ones."""
        running, self._iterator = self._iterator, None
        if running is not None:
            running._shutdown_workers()


@dataclass(eq=False)
class Flight:
    """Shared memory that batches take on their way to this process, set aside until ``end`` or the object's own end."""

    bytes: int

    def end(self) -> None:
        """Give the memory back."""
        self.bytes = 0

    @classmethod
    def of(cls, needed: int, workers: int) -> "Flight | None":
        """``needed`` bytes, or None and a warning where so much is not free beside what is set aside already."""
        with _taking:
            free = free_shared_memory()
            if free is None or needed + sum(flight.bytes for flight in _flights) <= free:
                flight = cls(needed)
                _flights.add(flight)
                return flight
        warnings.warn(
            f"make_loader: shared memory must hold {needed / 1e6:.0f} MB of batches that {workers} workers read ahead, "
            f"got {free / 1e6:.0f} MB free in /dev/shm: this process reads them, as with workers=0, which is slower. "
            "Give it more (docker run --shm-size), or use smaller batches",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


_flights: "weakref.WeakSet[Flight]" = weakref.WeakSet()
_taking = threading.Lock()


class _Queued:
    """DataLoader's batch sampler: the batches of the latest ``begin``."""

    batches: Iterable[list[Task]] = ()

    def __iter__(self) -> Iterator[list[Task]]:
        return iter(self.batches)


@dataclass(frozen=True)
class _NoRoom:
    """What a worker sends in place of a batch for which it got no shared memory."""

    reason: str


class _InWorker:
    """DataLoader's data set: reads a batch and moves it to shared memory.

    The move happens here, in the worker's main thread. If it were left to the thread that sends batches, as torch
    does, a failure would be printed, the batch would never come and its receiver would wait for ever.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitems__(self, tasks: list[Task]) -> Loaded | _NoRoom:
        loaded = self.reader(tasks)
        try:
            for images in loaded.views:
                if images.numel():
                    images.share_memory_()
        except (RuntimeError, OSError) as error:
            return _NoRoom(str(error).splitlines()[0])
        return loaded._replace(indices=loaded.indices.numpy())  # travels in the message: no file of its own


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; this one waits for its parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_is(loaded: Any) -> Any:
    return loaded


class _Deliveries(_MultiProcessingDataLoaderIter):
    """torch's iterator over what workers deliver."""

    def __init__(self, workers: Workers) -> None:
        self._seconds = workers.seconds
        super().__init__(workers)

    def __next__(self) -> Loaded:
        with on_cpu():
            loaded = super().__next__()
        if isinstance(loaded, _NoRoom):
            raise MemoryError(
                f"make_loader: batches must fit into shared memory, got {loaded.reason}; use workers=0, fewer workers, "
                "smaller batches, or more shared memory (docker run --shm-size)"
            )
        return loaded._replace(indices=torch.from_numpy(loaded.indices))

    def _get_data(self) -> Any:
        """The next message from any worker. All waits go through here, also that for the end of an older epoch."""
        with _Watch(self._workers, self._seconds):
            try:
                return super()._get_data()
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise RuntimeError(
                    f"make_loader: workers must live until they are closed, got one that died ({error}); if memory was "
                    "short, use fewer workers or workers=0"
                ) from None

    def _shutdown_workers(self) -> None:
        try:
            super()._shutdown_workers()
        except RuntimeError as error:  # raised by torch's handler of signals, wherever it is told that a worker died
            if not str(error).startswith("DataLoader worker"):
                raise
        finally:
            for worker in self._workers if self._shutdown else ():  # a stopped process does not hear that it shall end
                if worker.is_alive():
                    worker.kill()


class _Watch:
    """A block that waits for ``processes``. After ``seconds`` they are killed, which ends the wait with an error.

    The time counts in steps while this process runs, so that a pause of both (Ctrl-Z) is no delay.

    Raises:
        TimeoutError: the time was over, whatever error their end gave.
    """

    def __init__(self, processes: list, seconds: float) -> None:
        self._killed = False
        self._seconds = seconds
        self._processes = processes
        self._steps = max(1, round(seconds))
        self._step = seconds / self._steps
        self._over = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, name="fastreid_u-watch", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        if self._killed and isinstance(error, Exception):
            raise TimeoutError(
                f"make_loader: workers must deliver a batch within {self._seconds:g} s, got none: a file system that "
                "does not answer, or a stopped process? Use workers=0, worker_start='forkserver', or set "
                f"{TIMEOUT_VARIABLE} to more seconds"
            ) from None

    def _watch(self) -> None:
        for _ in range(self._steps):
            if self._over.wait(self._step):
                return
        self._killed = True
        for process in self._processes:
            with contextlib.suppress(OSError, ValueError):  # it has ended or was closed
                process.kill()


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE) or str(_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(f"make_loader: {TIMEOUT_VARIABLE} must be a positive number of seconds, got {text!r}")
    return seconds

# SPDX-License-Identifier: Apache-2.0
"""How worker processes start: Python's ways, with what keeps a worker's end from blocking the process it works for."""

import ctypes
import functools
import multiprocessing
import multiprocessing.context
import threading

import numpy as np
import torch


def context(start: str | None) -> multiprocessing.context.BaseContext:
    """Python's context for the start method ``start``, None for its default."""
    if start == "forkserver":  # the server imports what workers need once; without effect where it runs already
        multiprocessing.set_forkserver_preload(["__main__", "fastreid_u.data.workers"])
    return _of(multiprocessing.get_context(start).get_start_method())


@functools.cache
def _of(start: str) -> multiprocessing.context.BaseContext:
    plain = multiprocessing.get_context(start)
    own = {"Event": lambda self: Flag(self)}
    if start == "fork":
        own["Process"] = _forked(plain.Process)
    return type("WorkerContext", (type(plain),), own)()


class Flag:
    """An event between processes that is set once, without a lock.

    Python's own is read under a lock. A worker that is stopped or killed while it reads has that lock for ever, and the
    process that looks after its workers would wait for it without end.
    """

    def __init__(self, context: multiprocessing.context.BaseContext) -> None:
        self._byte = context.RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        self._byte.value = True

    def is_set(self) -> bool:
        return self._byte.value


def _forked(process: type) -> type:
    """Python's forked process, for a parent that may have threads.

    Another thread may be drawing numbers at the moment of the fork. The lock of the generator that it draws from then
    stays locked in the child for ever, and torch seeds that generator there.
    """

    class Process(process):
        def start(self) -> None:
            self.threads = threading.active_count()
            super().start()

        def run(self) -> None:
            if self.threads > 1:
                torch.random.default_generator = torch.Generator()
                np.random.set_bit_generator(np.random.MT19937(0))
            super().run()

    return Process

# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels over blocks of rows, on a given number of Python threads.

A kernel is compiled without the interpreter lock and takes a range of rows, so plain threads run it side by side and
fetch the next block when they are done: rows differ a hundredfold in work. numba's own ``prange`` would deal the blocks
out in advance, take several times as long to compile, and tie us to a threading layer that dies when two threads of the
user call it at once or when a process forks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numba import njit


def kernel(function: Callable | None = None, **options: Any) -> Callable:
    """``numba.njit`` that lets the interpreter lock go and keeps machine code on disk if there is a place for it.

    numba renews that code when the kernel's own file changes, not when a kernel it calls in another file does.
    """
    if function is None:
        return lambda f: kernel(f, **options)
    try:
        return njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # neither the package nor a home directory can be written: compile once per process
        return njit(function, nogil=True, **options)


def over_rows(run: Callable, n: int, threads: int, *arguments: Any, most: int = 4096, begin: int = 0) -> list:
    """``run(first, last, *arguments)`` on blocks of at most ``most`` of the rows ``begin .. n - 1``; what it returned,
    in order of the rows.

    Blocks are small enough to keep all threads busy to the end. How rows fall into blocks must not matter to ``run``.
    """
    rows = max(1, min(most, (n - begin) // (8 * threads) + 1))
    begins = range(begin, n, rows)
    ends = [min(first + rows, n) for first in begins]
    if threads == 1 or len(begins) <= 1:
        return [run(first, last, *arguments) for first, last in zip(begins, ends, strict=True)]
    with ThreadPoolExecutor(min(threads, len(begins))) as pool:
        return list(pool.map(run, begins, ends, *map(itertools.repeat, arguments)))

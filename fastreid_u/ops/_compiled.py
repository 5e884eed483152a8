# SPDX-License-Identifier: Apache-2.0
"""The compiled core ``_C``, bound to where it runs: CPU threads, its own CUDA kernels, or the same kernels by CuPy.

Where no nvcc was, CuPy compiles the source of the kernels, which comes with the package. ``_C`` then runs its phases
through a :class:`Launcher`: it names the next kernel and its argument, so what happens and in which order stays in C++.
CuPy is imported when the first kernel is launched, takes under a second for each, and keeps the machine code on disk.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastreid_u import _ext


def entry_point(name: str, backend: str, scratch: Tensor) -> Callable:
    """``_C``'s function ``name`` on ``backend``; its scratch memory, int64, tells the device and is passed along.

    On a GPU it runs on torch's current stream.
    """
    if backend == "cpp":
        where = {"threads": torch.get_num_threads()}
        run = getattr(_ext.core(), f"{name}_cpu")
    elif backend == "cuda":
        stream = torch.cuda.current_stream(scratch.device).cuda_stream
        where = {"device": scratch.device.index, "stream": stream}
        run = getattr(_ext.core(), f"{name}_cuda")
    else:
        where = {"launcher": Launcher(scratch)}
        run = getattr(_ext.core(), f"{name}_launched")
    return functools.partial(run, scratch=scratch.data_ptr(), **where)


def source_folder() -> Path:
    """Where the install put the headers: next to ``_C``."""
    return Path(_ext.core().__file__).parent / "csrc"


@functools.cache
def source() -> str:
    """What to compile. CuPy knows code by its text, so that names the state of the headers."""
    state = hashlib.sha256()
    for header in sorted(source_folder().iterdir()):
        state.update(header.read_bytes())
    return f'// {state.hexdigest()}\n#include "device.cuh"\n#include "pseudo_labels.h"\n'


def options() -> tuple[str, ...]:
    """For the compiler; CuPy adds the architecture, and that functions are for the device unless marked otherwise."""
    return "-std=c++17", f"-I{source_folder()}"


@functools.cache
def _kernel(name: str) -> Callable:
    import cupy

    return cupy.RawModule(code=source(), options=options(), name_expressions=(name,)).get_function(name)


class Launcher:
    """What ``_C`` calls to launch kernels on torch's current stream, and to read its scratch memory in that order."""

    def __init__(self, scratch: Tensor) -> None:
        self._scratch = scratch

    def launch(self, kernel: str, blocks: int, threads: int, n: int, functor: bytes) -> None:
        """Launch the instance ``kernel`` of a template with the arguments ``n`` and the struct ``functor``."""
        import cupy

        device = self._scratch.device
        stream = torch.cuda.current_stream(device).cuda_stream
        by_value = np.frombuffer(functor, f"V{len(functor)}")  # CuPy passes an array of one element as what it holds
        with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream, device.index):
            _kernel(kernel)((blocks,), (threads,), (np.int64(n), by_value))

    def read(self, address: int) -> int:
        """The word at ``address``, once everything launched so far is done."""
        return int(self._scratch[self._place(address)])

    def write(self, address: int, value: int) -> None:
        """Put a word there, in the order of launches."""
        self._scratch[self._place(address)] = value

    def _place(self, address: int) -> int:
        return (address - self._scratch.data_ptr()) // self._scratch.element_size()

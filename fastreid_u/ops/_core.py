# SPDX-License-Identifier: Apache-2.0
"""The compiled core ``_C``, bound to where it runs: CPU threads, its own CUDA kernels, or the same kernels by CuPy."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastreid_u import _env, _ext
from fastreid_u.ops._nvrtc import Launcher


def missing(backend: str) -> str | None:
    """Why "cpp", "cuda" or "cupy" cannot run here, or None if it can."""
    needs = {
        "cpp": (_env.core,),
        "cuda": (_env.core_cuda,),
        "cupy": (_env.core, _env.cupy, _env.gpu),
    }
    return next((found.detail for probe in needs[backend] if not (found := probe()).present), None)


def entry_point(name: str, backend: str, scratch: Tensor) -> Callable:
    """``_C``'s function ``name`` on ``backend``; its scratch memory, int64, tells the device and is passed along.

    On a GPU it runs on torch's current stream.
    """
    core = _ext.core()
    if backend == "cpp":
        where = {"threads": torch.get_num_threads()}
        run = getattr(core, f"{name}_cpu")
    elif backend == "cuda":
        stream = torch.cuda.current_stream(scratch.device).cuda_stream
        where = {"device": scratch.device.index, "stream": stream}
        run = getattr(core, f"{name}_cuda")
    else:
        where = {"launcher": Launcher(scratch)}
        run = getattr(core, f"{name}_launched")
    return functools.partial(run, scratch=scratch.data_ptr(), **where)

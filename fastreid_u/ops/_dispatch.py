# SPDX-License-Identifier: Apache-2.0
"""The only place that decides which backend runs an op, and that knows what each backend needs."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping

import torch

from fastreid_u import _env
from fastreid_u._checks import require_choice

log = logging.getLogger(__name__)

# What "auto" tries on each kind of device, fastest first. A backend that a device does not list cannot run there; what
# comes after the reference, which always can, runs only when asked for.
PREFERENCE = {
    "cpu": ("cpp", "numba", "reference", "faiss"),
    "cuda": ("cuda", "cupy", "triton", "segments", "reference", "faiss"),
}

# The probes of ``_env`` that must find something before a backend can run, the first to be missed first.
NEEDS = {
    "cpp": ("core",),
    "cuda": ("core_cuda",),
    "cupy": ("core", "cupy", "gpu"),
    "faiss": ("numba", "faiss"),  # numba measures the candidates that faiss names
    "numba": ("numba",),
    "triton": ("triton",),
}


def choose(
    op: str, device: torch.device, backend: str, *, cannot: Mapping[str, str | None] | None = None, **runs: Callable
) -> Callable:
    """Pick the implementation of ``op`` that runs on ``device``.

    Args:
        op: public name, for messages.
        device: where the inputs live.
        backend: "auto", or one of ``runs``.
        cannot: for a backend that is there but does not take these arguments, or needs more than ``NEEDS`` knows: why,
            and what would change that; None if nothing is in the way.
        runs: the implementations, each under the name of its backend; "reference" is one of them.

    Returns:
        The implementation. "auto" takes the first of ``PREFERENCE[device.type]`` that can run and never catches an
        error of it; where only the reference is left, though a GPU or another backend should do better, it warns once
        per op.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend asked for cannot run here; the message gives the reason.
    """
    require_choice(op, "backend", backend, ("auto", *runs))
    here = PREFERENCE.get(device.type, ("reference",))
    if backend == "auto":
        name = _fastest(op, device.type, [name for name in here if name in runs], cannot or {})
    else:
        name = backend
        why = missing(name) or (cannot or {}).get(name)
        if why:
            raise RuntimeError(f"{op}: backend must be able to run here, got {name!r}: {why}")
        if name not in here:
            raise RuntimeError(f"{op}: backend must run on {device.type} tensors, got {name!r}")
    if not torch.compiler.is_compiling():  # a log line would break the graph
        log.debug("%s on %s runs %s", op, device, name)
    return runs[name]


def missing(backend: str) -> str | None:
    """What ``backend`` lacks on this machine, and how to get it; None if nothing."""
    found = (getattr(_env, probe)() for probe in NEEDS.get(backend, ()))
    return next((capability.detail for capability in found if not capability.present), None)


# For torch.compile, which cannot trace the probes, the result is a constant. torch.compiler.assume_constant_result does
# just this, after it has imported dynamo, which takes seconds.
missing._dynamo_marked_constant = True


def no_float64(*tensors: torch.Tensor) -> str | None:
    """Why a kernel that computes in float32 does not take these tensors, or None: a word for ``cannot``."""
    found = torch.float64 in [x.dtype for x in tensors]
    return "the kernel computes in float32, and float64 was given" if found else None


def first_derivative_only(op: str) -> Callable:
    """What stands for the backward of a kernel that is itself the backward of ``op``: an error that names the way out.

    Without it torch would ask for a formula to be registered, under a name that no user has seen.
    """

    def backward(ctx, *upstream) -> None:
        raise RuntimeError(f"{op}: backend must be 'reference' for a second derivative, got 'triton'")

    return backward


def _fastest(op: str, device: str, names: list[str], cannot: Mapping[str, str | None]) -> str:
    """The first of ``names`` that can run; a warning if it is the reference and need not be."""
    reasons = []
    for name in names:
        why = missing(name) or cannot.get(name)
        if not why:
            break
        reasons.append(why)
    if name == "reference" and (reasons or device != "cpu") and not torch.compiler.is_compiling():
        _warn_slow(op, "; ".join(reasons) or f"no {device} kernel yet")
    return name


@functools.cache
def _warn_slow(op: str, why: str) -> None:
    warnings.warn(f"{op}: {why}, running the slow reference", RuntimeWarning, stacklevel=5)

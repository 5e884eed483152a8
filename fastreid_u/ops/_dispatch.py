# SPDX-License-Identifier: Apache-2.0
"""The only place that decides which backend runs an op."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping

import torch

from fastreid_u._checks import require_choice

log = logging.getLogger(__name__)

# What "auto" tries on each kind of device, fastest first. A backend that a device does not list cannot run there; what
# comes after the reference, which always can, runs only when asked for.
PREFERENCE = {
    "cpu": ("cpp", "numba", "reference", "faiss"),
    "cuda": ("cuda", "cupy", "triton", "reference", "faiss"),
}


def choose(op: str, device: torch.device, backend: str, table: Mapping[str, Callable | str]) -> Callable:
    """Pick the implementation of ``op`` that runs on ``device``.

    Args:
        op: public name, for messages.
        device: where the inputs live.
        backend: "auto", or a key of ``table``.
        table: backend name to its callable, or to a sentence that says why it cannot run and how to change that.

    Returns:
        The callable. "auto" takes the first available of ``PREFERENCE[device.type]`` and never catches an error of
        it; where only the reference is left, though a GPU or a listed backend should do better, it warns once per op.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    require_choice(op, "backend", backend, ("auto", *table))
    here = PREFERENCE.get(device.type, ("reference",))
    if backend == "auto":
        name = next(name for name in here if callable(table.get(name)))
        if name == "reference" and not torch.compiler.is_compiling():
            faster = here[: here.index("reference")]
            missing = [table[name] for name in faster if isinstance(table.get(name), str)]
            if missing or device.type != "cpu":
                _warn_slow(op, "; ".join(missing) or f"no {device.type} kernel yet")
    else:
        name = backend
        if isinstance(table[name], str):
            raise RuntimeError(f"{op}: backend must be able to run here, got {name!r}: {table[name]}")
        if name not in here:
            raise RuntimeError(f"{op}: backend must run on {device.type} tensors, got {name!r}")
    if not torch.compiler.is_compiling():  # a log line would break the graph
        log.debug("%s on %s runs %s", op, device, name)
    return table[name]


@functools.cache
def _warn_slow(op: str, why: str) -> None:
    warnings.warn(f"{op}: {why}, running the slow reference", RuntimeWarning, stacklevel=4)

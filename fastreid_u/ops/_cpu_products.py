# SPDX-License-Identifier: Apache-2.0
"""Products of matrices by torch for the compiled kernels of a CPU."""

from __future__ import annotations

import numpy as np
import torch


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Write a b to ``out``."""
    torch.mm(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def product_dtype() -> type:
    """In which a float32 product really is one: a process-wide setting may let it round its factors."""
    try:
        rounds = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through torch.backends' newer names, which that function does not read
        rounds = True
    return np.float64 if rounds else np.float32


def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16, rather than imitating it more slowly than float32."""
    probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return torch.backends.mkldnn.is_available() and any(probe is not None and probe() for probe in probes)


def in_bfloat16(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Write a b' to ``out``, all in bfloat16, for which uint16 stands; summed in float32."""
    a, b, out = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (a, b, out))
    torch.mm(a, b.T, out=out)

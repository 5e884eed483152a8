# SPDX-License-Identifier: Apache-2.0
"""The backends of ``rank_metrics``: what measures pairs and counts the gallery rows before them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastreid_u.ops import _cpu_products


class OfFeatures:
    """Squared distances of features on a CPU, compiled by numba."""

    def __init__(self, query: Tensor, gallery: Tensor) -> None:
        if query.shape[1] == 0:  # nothing to tell rows apart
            query, gallery = query.new_zeros(len(query), 1), gallery.new_zeros(len(gallery), 1)
        self.query, self.gallery = query.contiguous(), gallery.contiguous()

    def measure(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        from fastreid_u.cpu import rank_metrics as cpu

        return cpu.measure(self.query.numpy(), self.gallery.numpy(), row, column, threads=torch.get_num_threads())

    def count(self, start: np.ndarray, column: np.ndarray, distance: np.ndarray) -> np.ndarray:
        from fastreid_u.cpu import rank_metrics as cpu

        return cpu.count(
            self.query.numpy(), self.gallery.numpy(), start, column, distance, threads=torch.get_num_threads(),
            product=_cpu_products.product, dtype=_cpu_products.product_dtype(),
            bfloat16=_cpu_products.in_bfloat16 if _cpu_products.has_bfloat16() else None,
        )  # fmt: skip

    def subset(self, members: np.ndarray) -> OfFeatures:
        return type(self)(self.query, self.gallery[torch.from_numpy(members).to(self.gallery.device)])


class OfFeaturesOnGPU(OfFeatures):
    """The same by Triton, on the features' device; pairs and counts come and go."""

    def measure(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        from fastreid_u.kernels import rank_metrics as kernels

        return kernels.measure(self.query, self.gallery, *_on(self.query.device, row, column)).cpu().numpy()

    def count(self, start: np.ndarray, column: np.ndarray, distance: np.ndarray) -> np.ndarray:
        from fastreid_u.kernels import rank_metrics as kernels

        marks = _on(self.query.device, start, column, distance)
        return torch.stack(tuple(kernels.count(self.query, self.gallery, *marks))).cpu().numpy()


class OfMatrix:
    """Ready distances on a CPU."""

    def __init__(self, distmat: Tensor) -> None:
        self.distmat = distmat.contiguous()

    def measure(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return self.distmat[_on(self.distmat.device, row, column)].double().cpu().numpy()

    def count(self, start: np.ndarray, column: np.ndarray, distance: np.ndarray) -> np.ndarray:
        from fastreid_u.cpu import rank_metrics as cpu

        return cpu.count_in(self.distmat.numpy(), start, column, distance, threads=torch.get_num_threads())

    def subset(self, members: np.ndarray) -> OfMatrix:
        return type(self)(self.distmat[:, torch.from_numpy(members).to(self.distmat.device)])


class OfMatrixOnGPU(OfMatrix):
    """The same by Triton."""

    def count(self, start: np.ndarray, column: np.ndarray, distance: np.ndarray) -> np.ndarray:
        from fastreid_u.kernels import rank_metrics as kernels

        marks = _on(self.distmat.device, start, column, distance)
        return torch.stack(tuple(kernels.count_in(self.distmat, *marks))).cpu().numpy()


def _on(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)

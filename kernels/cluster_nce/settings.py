# SPDX-License-Identifier: Apache-2.0
"""The settings of the loss, the same for the forward, the backward and autograd."""

from typing import NamedTuple

import torch

from .layout import as_rows

BAD_TARGET, MASKED_TARGET = 1, 8  # bits of `status`; 2 and 4 belong to other kernels
STORED_BYTES = 64 * 2**20  # logits up to this size are kept for the backward
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32"}  # tf32x3: three products of rounded halves, as accurate as float32


class Settings(NamedTuple):
    """What shapes the loss besides features, targets and memory.

    The backward reads neither the sizes of ``teacher_weight``, ``smoothing`` and ``extra_weight`` nor ``focal``,
    ``epsilon``, ``weight`` and ``reduction``: the forward has put them into ``stats``. It only asks whether
    ``smoothing`` is given.
    """

    temperature: float = 0.05
    """divides the similarities"""
    normalize: bool = True
    """scale the rows of ``x`` and ``teacher`` to unit length"""
    teacher: torch.Tensor | None = None
    """(B, D) floating point features of a teacher, normalised as ``x`` is"""
    teacher_weight: float | torch.Tensor = 0.0
    """share of the teacher's softmax in the target, in [0, 1], a number or (B,)"""
    teacher_temperature: float | None = None
    """that of the teacher's softmax; None for ``temperature``"""
    smoothing: float | torch.Tensor = 0.0
    """share of the uniform distribution in the target, in [0, 1], a number or (B,)"""
    extra_target: torch.Tensor | None = None
    """(B, C) floating point rows to add to the target"""
    extra_weight: float | torch.Tensor = 0.0
    """their factor, in [0, 1], a number or (B,)"""
    focal: float = 0.0
    """exponent of the factor ``1 - p_y``: 0, or at least 1"""
    epsilon: float = 0.0
    """added to the sum of the softmax and to ``p_y``; for plain targets only"""
    class_mask: torch.Tensor | None = None
    """(C,) bool, False for classes that take no part; as a target such a class makes the loss NaN"""
    weight: torch.Tensor | None = None
    """(B,) factors on the loss of each sample"""
    ignore_index: int = -1
    """target of samples that take no part"""
    reduction: str = "mean"
    """"mean" over the samples that take part, "sum" or "none" """
    precision: str = "fp32"
    """"fp32" (split products on tensor cores) or "tf32" """

    def laid_out(self) -> "Settings":
        """The same with tensors as the kernels read them: rows and lists without gaps."""
        return self._make(
            (as_rows(value) if value.ndim == 2 else value.contiguous()) if isinstance(value, torch.Tensor) else value
            for value in self
        )

    @property
    def soft(self) -> dict[str, bool]:
        """Which parts the target has besides its one class, as the kernels' compile-time switches."""
        teacher, extra = self.teacher is not None, self.extra_target is not None
        return {"TEACHER": teacher, "UNIFORM": is_given(self.smoothing), "EXTRA": extra}

    @property
    def is_dense(self) -> bool:
        """Whether the target has a number of its own for each pair of a sample and a class."""
        return self.teacher is not None or self.extra_target is not None


def is_given(share: float | torch.Tensor) -> bool:
    """Whether a part of the target is there: one number each always is."""
    return isinstance(share, torch.Tensor) or share > 0


def is_lean(b: int, c: int, teacher: bool = False) -> bool:
    """Whether (b, c) logits, and as many of a teacher, are too many to keep for the backward."""
    return 4 * b * c * (1 + teacher) > STORED_BYTES

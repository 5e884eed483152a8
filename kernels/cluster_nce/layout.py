# SPDX-License-Identifier: Apache-2.0
"""What the kernels hand each other: the rows of ``stats`` and ``partial``, and how tensors are laid out for them."""

import torch
import triton.language as tl

EPS = tl.constexpr(1e-12)  # smallest length that divides, as in torch.nn.functional.normalize
# rows of `stats`, (9, B) float32: what the forward leaves for the backward; the last five are coefficients of
# d loss / d l on p, on the target's class, on the teacher's distribution, on every class, on the extra target
STATS = 9
LSE, TEACHER_LSE, INV_NORM, SLOPE, OF_P, OF_TARGET, OF_TEACHER, OF_ONE, OF_EXTRA = (tl.constexpr(i) for i in range(9))
# rows of `partial`, (10, B, splits) float32 and then (B,) logits of the targets: sums over a split's classes; for p and
# the teacher the largest logit, the sum of exp, the sum of exp times the student's logit
SUMS = tl.constexpr(10)
P_SUMS, TEACHER_SUMS, CLASSES, LOGIT_SUM, EXTRA_SUM, EXTRA_LOGITS = (tl.constexpr(i) for i in (0, 3, 6, 7, 8, 9))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbouring columns side by side: the kernels step along a row by one."""
    return x if x.stride(1) == 1 else x.contiguous()


def number_bytes(x: torch.Tensor, memory: torch.Tensor) -> int:
    """Bytes of the wider of the two dtypes, by which a tile is chosen."""
    return max(x.element_size(), memory.element_size())

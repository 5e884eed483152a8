# SPDX-License-Identifier: Apache-2.0
"""What forward and backward share: the rows of ``stats``, the roles of proxies, how tensors are laid out."""

import torch
import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)  # smallest length that divides, as in torch.nn.functional.normalize
# rows of `stats`, (5, B) float32: what the forward leaves for the backward
LSE, SLOPE, INV_NORM, COEFFICIENT, INV_COUNT = (tl.constexpr(i) for i in range(5))


@triton.jit
def roles(cluster, camera, clusters_ptr, cameras_ptr, q, live, SCOPE: tl.constexpr, POSITIVES: tl.constexpr):
    """For samples against proxies ``q``: same cluster (in reach), positive, negative."""
    same = tl.load(clusters_ptr + q, mask=live, other=0) == cluster
    reach = live
    positive = same & live
    if SCOPE == "camera":
        reach = live & (tl.load(cameras_ptr + q, mask=live, other=0) == camera)
        positive = same & reach
    elif POSITIVES == "other_cameras":
        positive = positive & (tl.load(cameras_ptr + q, mask=live, other=0) != camera)
    return same & reach, positive, (same == 0) & reach


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbouring columns side by side: the kernels step along a row by one."""
    return x if x.stride(1) == 1 else x.contiguous()


def number_bytes(x: torch.Tensor, memory: torch.Tensor) -> int:
    """Bytes of the wider of the two dtypes, by which a tile is chosen."""
    return max(x.element_size(), memory.element_size())

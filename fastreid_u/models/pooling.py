# SPDX-License-Identifier: Apache-2.0
"""Spatial pooling: a (B, C, H, W) feature map becomes one (B, C) row per image.

All three pool in float32 when the map arrives in half precision (bf16 autocast): 128 positions raised to the third
power do not fit the 8 bits of a bf16 mantissa, and the cast costs little next to the backbone.
"""

import torch
from torch import Tensor, nn

from fastreid_u._checks import require_choice, require_positive


def _full_precision(feature_map: Tensor) -> Tensor:
    return feature_map.float() if feature_map.dtype in (torch.float16, torch.bfloat16) else feature_map


class GeM(nn.Module):
    """Generalised-mean pooling, ``y = mean(max(x, eps)^p)^(1/p)`` over the positions of each channel.

    p = 1 is the average of the clamped map; the larger p, the nearer to the maximum. ``p`` is one learnable number
    for all channels. Entries below ``eps`` pass no gradient, but still count as ``eps`` in the mean.

    Args:
        p: initial exponent, > 0.
        eps: floor of the activations, > 0.

    Shapes: (B, C, H, W) in float32, float64 or half; (B, C) out, in float32 or the input's wider dtype.
    Memory: two float32 copies of the map are kept for backward, three if it came in half precision (B = 256,
    ResNet-50 at 256x128: 0.27 GB each).

    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019; eps and the one p
    (3 at first) as in Cluster Contrast.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        # one element rather than a scalar, as in published checkpoints
        self.p = nn.Parameter(torch.full((1,), require_positive("GeM", "p", p)))
        self.eps = require_positive("GeM", "eps", eps)

    def forward(self, feature_map: Tensor) -> Tensor:
        x = _full_precision(feature_map).clamp(min=self.eps)
        # y is homogeneous in x, so dividing by the maximum changes neither y nor its gradients; without it x^p leaves
        # float32 as p grows (1e-6 at p = 7.5 is 0, and the root's slope there is infinite).
        peak = x.detach().amax((2, 3), keepdim=True)
        mean = (x / peak).pow(self.p).mean((2, 3))
        return peak.flatten(1) * mean.pow(1.0 / self.p)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"


class AveragePool(nn.Module):
    """Mean over positions, summed in float32: (B, C, H, W) to (B, C)."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return _full_precision(feature_map).mean((2, 3))


class MaxPool(nn.Module):
    """Maximum over positions; equal maxima share the gradient: (B, C, H, W) to (B, C), float32 at least."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return _full_precision(feature_map.amax((2, 3)))


_POOLINGS = {"gem": GeM, "avg": AveragePool, "max": MaxPool}
POOLINGS = tuple(_POOLINGS)


def make_pooling(name: str) -> nn.Module:
    """``name`` is one of ``POOLINGS``."""
    return _POOLINGS[require_choice("build_model", "pooling", name, POOLINGS)]()

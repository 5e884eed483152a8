# SPDX-License-Identifier: Apache-2.0
"""The Re-ID network: backbone, pooling, BNNeck, unit length."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_u.models.neck import bnneck


class ReIDModel(nn.Module):
    """``l2(BN(pool(backbone(images))))``, in training and in evaluation alike.

    Made by :func:`~fastreid_u.models.build_model`. The steps are methods of their own, for losses that want the map
    (parts), the pooled feature, or the neck's output before it is scaled to unit length.

    Args:
        backbone: gives (B, C, H, W) maps, or (B, C) rows if it pools by itself; has ``num_features`` = C.
        pooling: (B, C, H, W) to (B, C).
        arch: name for the recipe card.
        card: what else the recipe card should show.

    Attributes:
        num_features: D, width of the output.
        arch: architecture name.
        card: entries that :meth:`describe` adds to what it finds in the modules.
    """

    def __init__(self, backbone: nn.Module, pooling: nn.Module, *, arch: str, card: dict | None = None) -> None:
        super().__init__()
        self.arch = arch
        self.num_features: int = backbone.num_features
        self.backbone = backbone
        self.pooling = pooling
        self.bnneck = bnneck(self.num_features)
        self.card = dict(card or {})

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images to the backbone's (B, D, h, w) map; (B, D) from a backbone that pools by itself."""
        return self.backbone(images)

    def pool(self, feature_map: Tensor) -> Tensor:
        """(B, D, h, w) to (B, D), float32 under autocast; rows pass unchanged."""
        return feature_map if feature_map.ndim == 2 else self.pooling(feature_map)

    def neck(self, pooled: Tensor) -> Tensor:
        """(B, D) to (B, D): the BNNeck's output, not of unit length."""
        return self.bnneck(pooled.to(self.bnneck.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, normalised as the weights want it, to (B, D) rows of unit length in float32."""
        features = self.neck(self.pool(self.feature_map(images)))
        return F.normalize(features if features.dtype.itemsize >= 4 else features.float())

    def describe(self) -> dict:
        """What a recipe card shows of the network: plain numbers, strings, booleans and None."""
        return {
            "arch": self.arch,
            "parameters": sum(p.numel() for p in self.parameters()),
            "num_features": self.num_features,
            **self.card,
            "bn_group": getattr(self.bnneck, "group_size", None),
            "bn_running": getattr(self.bnneck, "running", None),
        }

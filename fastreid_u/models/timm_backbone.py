# SPDX-License-Identifier: Apache-2.0
"""Backbones of the timm library, as ``timm/<name>``; timm is an optional dependency.

Convolutional networks give their feature map, pooled like any other. Token networks (ViT) pool as their own head
does, by class token or mean, so ``pooling`` does not apply to them. Strides are timm's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimmBackbone(nn.Module):
    """A timm network without its classifier.

    Args:
        name: timm's name, with or without the tag of its weights ("vit_small_patch16_224.dino").
        pretrained: take timm's weights, downloaded on first use.
        drop_path: stochastic depth of the last block in training, in [0, 1); it rises linearly from the first.

    Attributes:
        num_features: D.
        gives_map: whether the output is (B, D, h, w) rather than (B, D).

    Raises:
        RuntimeError: timm is not installed, or the weights cannot be had.
        ValueError: timm knows no such name.
    """

    def __init__(self, name: str, *, pretrained: bool, drop_path: float = 0.0) -> None:
        try:
            import timm
        except ImportError as error:
            raise RuntimeError("build_model: arch 'timm/...' needs timm: pip install timm") from error

        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:8]) or "see timm.list_models()"
            raise ValueError(
                f"build_model: arch must be a model of timm {timm.__version__} (near: {near}), got {name!r}"
            )
        super().__init__()
        try:
            more = {"drop_path_rate": drop_path} if drop_path else {}
            self.net = timm.create_model(name, pretrained=pretrained, num_classes=0, **more)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise RuntimeError(
                f"build_model: could not get timm's weights of {name} ({error}). Without a network, give "
                "weights=<path of the file>, or weights=None for random weights"
            ) from error

        training = self.net.training
        with torch.no_grad():
            probe = torch.zeros(1, *self.net.pretrained_cfg["input_size"])
            self.gives_map = self.net.eval().forward_features(probe).ndim == 4
            if self.gives_map:
                self.net.reset_classifier(0, "")  # no pooling either
            self.channels_last_map = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
            self.num_features: int = self.forward(probe).shape[1]
        self.net.train(training)

    @property
    def positions(self) -> int | None:
        """Number of learned positions, class token included; None for a network without."""
        return self.net.pos_embed.shape[1] if getattr(self.net, "pos_embed", None) is not None else None

    def set_image_size(self, size: tuple[int, int]) -> None:
        """Fit position embeddings to (height, width) images; nothing to do for a network that takes any size."""
        if hasattr(self.net, "set_input_size"):
            self.net.set_input_size(img_size=tuple(size))

    def resampled_positions(self, given: Tensor) -> Tensor:
        """Learned positions (1, T, D) of a square grid or one twice as high as wide, bilinearly on this network's grid.

        Those of the class token and its like stay as they are. What is no such grid, or is this one, is returned.
        """
        extra = getattr(self.net, "num_prefix_tokens", 0)
        if given.ndim != 3 or self.positions is None:
            return given
        cells = given.shape[1] - extra
        side, width = (math.isqrt(max(n, 0)) for n in (cells, cells // 2))
        shape = (side, side) if side * side == cells else (2 * width, width)
        if cells < 1 or shape[0] * shape[1] != cells or shape == tuple(self.net.patch_embed.grid_size):
            return given
        grid = given[:, extra:].float().transpose(1, 2).unflatten(2, shape)
        fitted = F.interpolate(grid, size=self.net.patch_embed.grid_size, mode="bilinear", align_corners=False)
        return torch.cat([given[:, :extra], fitted.flatten(2).transpose(1, 2).to(given.dtype)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.net(images)
        return x.permute(0, 3, 1, 2) if self.gives_map and self.channels_last_map else x

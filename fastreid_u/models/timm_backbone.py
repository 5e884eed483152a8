# SPDX-License-Identifier: Apache-2.0
"""Backbones of the timm library, as ``timm/<name>``; timm is an optional dependency.

Convolutional networks give their feature map, pooled like any other. Token networks (ViT), and those whose head cannot
be taken off, pool as their own head does, so ``pooling`` does not apply to them. Strides are timm's.
"""

import math
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What networks raise on images of a size that they do not take.
_WRONG_SIZE = (RuntimeError, AssertionError, ValueError, TypeError, LookupError, ArithmeticError)


class TimmBackbone(nn.Module):
    """A timm network without its classifier.

    Args:
        name: timm's name, with or without the tag of its weights ("vit_small_patch16_224.dino").
        pretrained: take timm's weights, downloaded on first use.
        drop_path: stochastic depth of the last block in training, in [0, 1); it rises linearly from the first.
        image_size: (height, width); one image of this size is run through the network.

    Attributes:
        num_features: D.
        gives_map: whether the output is (B, D, h, w) rather than (B, D).

    Raises:
        RuntimeError: timm is not installed, or the weights cannot be had.
        ValueError: timm has no network of this name, or the network does not take images of this size.
    """

    def __init__(
        self, name: str, *, pretrained: bool, drop_path: float = 0.0, image_size: tuple[int, int] = (256, 128)
    ) -> None:
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
        if pretrained:
            _refuse_offline(name)
        try:
            more = {"drop_path_rate": drop_path} if drop_path else {}
            self.net = timm.create_model(name, pretrained=pretrained, num_classes=0, **more)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise RuntimeError(_no_weights(name, error)) from error

        training = self.net.training
        try:
            self._fit(tuple(image_size))
        except _WRONG_SIZE as error:
            own = " x ".join(map(str, self.net.pretrained_cfg["input_size"][1:]))
            raise ValueError(
                f"build_model: image_size must be one that timm/{name} takes, as {own}, got {image_size[0]} x "
                f"{image_size[1]} ({(str(error).splitlines() or [type(error).__name__])[0]})"
            ) from error
        self.net.train(training)

    @torch.no_grad()
    def _fit(self, size: tuple[int, int]) -> None:
        """Fit position embeddings to ``size``, and see what the network makes of an image."""
        if hasattr(self.net, "set_input_size"):
            self.net.set_input_size(img_size=size)
        probe = torch.zeros(1, 3, *size)
        features = self.net.eval().forward_features(probe)
        self.gives_map = isinstance(features, Tensor) and features.ndim == 4
        if self.gives_map:
            try:
                self.net.reset_classifier(0, "")  # no pooling either
            except AssertionError:  # EfficientViT's heads: layers after the pooling, which stay, and pool
                self.gives_map = False
        self.channels_last_map = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        self.num_features: int = self.forward(probe).shape[1]

    @property
    def positions(self) -> int | None:
        """Number of learned positions, class token included; None for a network without."""
        return self.net.pos_embed.shape[1] if getattr(self.net, "pos_embed", None) is not None else None

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


def _no_weights(name: str, reason: object) -> str:
    return (
        f"build_model: could not get timm's weights of {name} ({reason}). Without a network, give "
        "weights=<path of the file>, or weights=None for random weights"
    )


def _refuse_offline(name: str) -> None:
    """Without a network the download of weights is tried for a minute; whether there is one shows at once.

    Raises:
        RuntimeError: the weights of ``name`` are not on this machine, and the name of their server is not resolved.
    """
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    about = timm.get_pretrained_cfg(name)
    if about is None or not about.hf_hub_id or getproxies():  # a proxy resolves names by itself
        return
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(about.hf_hub_id, file), str) for file in files):
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError as error:
        raise RuntimeError(_no_weights(name, error)) from error

# SPDX-License-Identifier: Apache-2.0
"""Crops that lie in memory: arrays, tensors and PIL images, seen as a lossless file of the same pixels would be."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastreid_u.data.images import BadImage, upright_rgb

if TYPE_CHECKING:
    from PIL.Image import Image


def lies_in_memory(item: Any) -> bool:
    """Whether ``item`` is pixels rather than the path of a file."""
    from PIL import Image

    return isinstance(item, torch.Tensor | Image.Image) or (
        isinstance(item, np.ndarray) and item.dtype.kind not in "US"
    )


def listed(images: Any) -> Any:
    """A single crop as a list of one, a batch of crops as a list; anything else as it is."""
    if not lies_in_memory(images):
        return images
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def rgb_image(item: Any, name: str) -> "Image":
    """The RGB image of an array (H, W, 3), (H, W, 1) or (H, W), a tensor (3, H, W), (1, H, W) or (H, W), or of PIL.

    Arrays and tensors are uint8, in the order red, green, blue.

    Raises:
        TypeError: another dtype. ValueError: another shape, or a PIL image that cannot be decoded. Both messages begin
            with ``name``, which says where the item is.
    """
    from PIL import Image

    if isinstance(item, Image.Image):
        try:
            return upright_rgb(name, item)
        except (BadImage, OSError, SyntaxError) as error:
            raise ValueError(f"extract: {name} must be an image that can be decoded, got {error}") from error
    channels_first = isinstance(item, torch.Tensor)
    if channels_first and item.dtype == torch.uint8:
        item = item.detach().cpu().numpy()
    if getattr(item, "dtype", None) != np.uint8:
        raise TypeError(f"extract: {name} must be of dtype uint8 (0 to 255), got {item.dtype}")
    shape = tuple(item.shape)
    if channels_first and len(shape) == 3:
        item = item.transpose(1, 2, 0)
    grey = item.ndim == 2 or (item.ndim == 3 and item.shape[2] == 1)
    if item.size == 0 or not (grey or (item.ndim == 3 and item.shape[2] == 3)):
        rule = "(3, H, W), (1, H, W) or (H, W)" if channels_first else "(H, W, 3), (H, W, 1) or (H, W)"
        raise ValueError(f"extract: {name} must have shape {rule}, none of them 0, got {shape}")
    item = np.ascontiguousarray(item.reshape(item.shape[:2]) if grey else item)
    return upright_rgb(name, Image.fromarray(item))

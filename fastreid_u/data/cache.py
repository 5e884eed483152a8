# SPDX-License-Identifier: Apache-2.0
"""Decoded pixels that stay in memory, so that an image is read once a run and not once an epoch."""

import torch
from PIL import Image

from fastreid_u.data.images import read_pixels, resized_pixels
from fastreid_u.data.shared_memory import free_shared_memory


class PixelCache:
    """Decoded and resized images in memory, filled as they are first read.

    ``num * 3 * height * width`` bytes: Market-1501's training set takes 1.3 GB at 256 x 128 and 0.3 GB at 128 x 64.
    Give one cache to every loader over the same samples at the same size. With ``shared`` it lies in shared memory,
    where worker processes fill it together. Two of them may decode the same image at the same time; both write the
    same bytes, and the mark "ready" is set after them.

    Raises:
        MemoryError: shared memory (``/dev/shm``, small by default in containers) cannot hold it.
    """

    def __init__(self, num: int, height: int, width: int, *, shared: bool = False) -> None:
        if shared:
            _require_shared_memory(num * 3 * height * width)
        # Untouched pages cost nothing yet.
        self.pixels = torch.empty(num, 3, height, width, dtype=torch.uint8, device="cpu")
        self.ready = torch.zeros(num, dtype=torch.bool, device="cpu")
        if shared:
            self.pixels.share_memory_()
            self.ready.share_memory_()

    def get(self, index: int, path: str, *, truncated: bool = False) -> torch.Tensor:
        """(3, height, width) uint8 of image ``index``, decoded from ``path`` the first time, as ``read_rgb`` does."""
        if not self.ready[index]:
            self.pixels[index] = read_pixels(path, *self.pixels.shape[-2:], truncated=truncated)
            self.ready[index] = True
        return self.pixels[index]

    def put(self, index: int, image: Image.Image) -> None:
        """Keep an RGB ``image`` as image ``index``, which is then never read from a file."""
        self.pixels[index] = resized_pixels(image, *self.pixels.shape[-2:])
        self.ready[index] = True


def _require_shared_memory(needed: int) -> None:
    free = free_shared_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"make_loader: cache must fit into shared memory, got {needed / 1e9:.2f} GB for {free / 1e9:.2f} GB "
            "free in /dev/shm; use workers=0, cache=False, or more (docker run --shm-size)"
        )

# SPDX-License-Identifier: Apache-2.0
"""Decoded pixels that stay in memory, so that an image is read once a run and not once an epoch."""

import os
import shutil

import torch
from PIL import Image

from fastreid_u.data.images import read_pixels, resized_pixels


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
        self.pixels = torch.empty(num, 3, height, width, dtype=torch.uint8)  # untouched pages cost nothing yet
        self.ready = torch.zeros(num, dtype=torch.bool)
        if shared:
            self.pixels.share_memory_()
            self.ready.share_memory_()

    def get(self, index: int, path: str) -> torch.Tensor:
        """(3, height, width) uint8 of image ``index``, decoded from ``path`` the first time."""
        if not self.ready[index]:
            self.pixels[index] = read_pixels(path, *self.pixels.shape[-2:])
            self.ready[index] = True
        return self.pixels[index]

    def put(self, index: int, image: Image.Image) -> None:
        """Keep an RGB ``image`` as image ``index``, which is then never read from a file."""
        self.pixels[index] = resized_pixels(image, *self.pixels.shape[-2:])
        self.ready[index] = True


def _require_shared_memory(needed: int) -> None:
    if os.path.isdir("/dev/shm"):  # elsewhere shared memory has no such limit
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise MemoryError(
                f"make_loader: cache must fit into shared memory, got {needed / 1e9:.2f} GB for {free / 1e9:.2f} GB "
                "free in /dev/shm; use workers=0, cache=False, or more (docker run --shm-size)"
            )

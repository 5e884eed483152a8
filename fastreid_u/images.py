# SPDX-License-Identifier: Apache-2.0
"""What methods and label generators may know of the images that they learn from."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Images:
    """A set of training images, in the order of the set; tensors are on the CPU.

    Attributes:
        count: N.
        camids: (N,) int64 cameras, or None for data without.
        pids: (N,) int64 identities 0 .. P - 1 of a labelled *source* set; None for the images to be learned.
        source: the labelled images of a method that learns from such as well, or None.
        readable: (N,) bool, which images could be read when features were last extracted; the engine sets it. Before
            the first extraction all count as readable. Memory: N bytes.
    """

    count: int
    camids: Tensor | None = None
    pids: Tensor | None = None
    source: "Images | None" = None
    readable: Tensor | None = None

    def __post_init__(self) -> None:
        if self.readable is None:
            self.readable = torch.ones(self.count, dtype=torch.bool)

    def require_cameras(self, method: str, unless: str = "") -> None:
        """Raise ValueError if there are no cameras; ``unless`` names the setting with which ``method`` needs none."""
        if self.camids is None:
            raise ValueError(
                f"train: method {method!r} needs images of two cameras or more{unless and ', or '}{unless}"
            )

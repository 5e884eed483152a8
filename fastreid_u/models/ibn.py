# SPDX-License-Identifier: Apache-2.0
"""IBN-a: half the channels of a normalisation layer are normalised per image, the other half per batch.

Instance normalisation removes what an image's camera did to colour and contrast; keeping batch normalisation on the
other half keeps the contrast that tells people apart. It pays in the early stages only, so stage 4 has none.
Pan et al., "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", ECCV 2018.
"""

import torch
from torch import Tensor, nn


class IBN(nn.Module):
    """InstanceNorm (affine) on the first half of the channels, BatchNorm on the rest.

    (B, C, H, W) to the same shape and dtype. The submodules are called IN and BN as in the published weight files.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.half)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.IN(x[:, : self.half]), self.BN(x[:, self.half :])], dim=1)


def add_ibn_a(stages: list[nn.Sequential]) -> None:
    """Replace the first BatchNorm of every bottleneck of ``stages`` (1 to 3 of a ResNet) by :class:`IBN`, in place."""
    for stage in stages:
        for block in stage:
            block.bn1 = IBN(block.bn1.num_features)

# SPDX-License-Identifier: Apache-2.0
"""ResNet trunks: images in, the feature map of the last stage out; no pooling, no classifier.

The blocks are torchvision's and the parameter names too, so torchvision's and IBN-Net's files load
without renaming. Re-identification keeps the last stage at stride 1 (no dilation): a map twice as high and wide, for
four times the arithmetic of that stage.
He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; stride 1: Luo et al., CVPR-W 2019.
"""

from typing import NamedTuple

from torch import Tensor, nn

from fastreid_u.models.ibn import add_ibn_a


class ResNetSpec(NamedTuple):
    """What tells one ResNet from another."""

    bottleneck: bool
    depths: tuple[int, int, int, int]  # blocks per stage
    width: int = 64  # channels of the stem and of the first stage's 3x3 convolutions; doubles at each stage
    ibn: bool = False
    imagenet: str | None = None  # weights file, see weights.py


RESNETS = {
    "resnet18": ResNetSpec(False, (2, 2, 2, 2), imagenet="torchvision"),
    "resnet34": ResNetSpec(False, (3, 4, 6, 3), imagenet="torchvision"),
    "resnet50": ResNetSpec(True, (3, 4, 6, 3), imagenet="torchvision"),
    "resnet101": ResNetSpec(True, (3, 4, 23, 3), imagenet="torchvision"),
    "resnet152": ResNetSpec(True, (3, 8, 36, 3), imagenet="torchvision"),
    "resnet_ibn50a": ResNetSpec(
        True,
        (3, 4, 6, 3),
        ibn=True,
        imagenet="https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet50_ibn_a-d9d0bb7b.pth",
    ),
    "resnet_ibn101a": ResNetSpec(
        True,
        (3, 4, 23, 3),
        ibn=True,
        imagenet="https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet101_ibn_a-59ea0ac6.pth",
    ),
    # Small enough to train on a few CPU cores; no ImageNet weights exist.
    "resnet10": ResNetSpec(False, (1, 1, 1, 1), width=32),
    "resnet18_w32": ResNetSpec(False, (2, 2, 2, 2), width=32),
}

ALIASES = {
    "ibn50a": "resnet_ibn50a",
    "ibn101a": "resnet_ibn101a",
    "resnet50_ibn_a": "resnet_ibn50a",
    "resnet101_ibn_a": "resnet_ibn101a",
}


class ResNet(nn.Module):
    """Stem and four stages.

    Args:
        spec: depths, width and block.
        last_stride: stride of the fourth stage, 1 or 2; at 1 the map is 1/16 of the image in each direction.
        stem_relu: False leaves out the ReLU after the stem's BatchNorm, as the published CAP code does although its
            ImageNet weights were trained with it.

    (B, 3, H, W) in; (B, ``num_features``, ceil(H / 16), ceil(W / 16)) out at ``last_stride=1``.
    Convolutions are drawn from torch's global generator, kaiming normal by fan-out.
    """

    def __init__(self, spec: ResNetSpec, *, last_stride: int = 1, stem_relu: bool = True) -> None:
        from torchvision.models.resnet import BasicBlock, Bottleneck

        super().__init__()
        block = Bottleneck if spec.bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, spec.width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.width)
        self.relu = nn.ReLU(inplace=True) if stem_relu else nn.Identity()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        channels = spec.width
        for i, (depth, stride) in enumerate(zip(spec.depths, (1, 2, 2, last_stride), strict=True)):
            width = spec.width * 2**i
            self.add_module(f"layer{i + 1}", _stage(block, channels, width, depth, stride))
            channels = width * block.expansion
        self.num_features = channels

        if spec.ibn:
            add_ibn_a([self.layer1, self.layer2, self.layer3])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _stage(block: type[nn.Module], channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    """``depth`` blocks; the first one strides (in its 3x3 convolution and its shortcut) and widens."""
    out_channels = width * block.expansion
    shortcut = None
    if stride != 1 or channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    first = block(channels, width, stride, shortcut)
    return nn.Sequential(first, *(block(out_channels, width) for _ in range(depth - 1)))

# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PT028 (test_transform is not a test)
"""Training and test views of an image.

A ``View`` is a size and a chain of steps. A step takes ``(image, rng)`` and returns an image: (3, H, W) uint8 up to
``Normalize``, float32 after it; it never writes into its input, which may be a loader's cache. Randomness comes from
the NumPy generator that the loader derives from the position in the stream, never from a global one, and sums are
taken by NumPy, which does not split them among threads: an epoch is the same to the bit for every number of workers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from fastreid_u.pixel_norm import NAMED, RULE, is_pixel_norm, mean_and_std

IMAGENET_MEAN, IMAGENET_STD = NAMED["imagenet"]

Step = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability ``p``."""

    p: float = 0.5

    def draw(self, rng: np.random.Generator) -> bool:
        return rng.random() < self.p

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return image.flip(-1) if self.draw(rng) else image


@dataclass(frozen=True)
class PadCrop:
    """Zero-pad ``pad`` pixels on every side, then crop the old size at a uniform place: a shift by up to ``pad``."""

    pad: int = 10

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """How far the picture moves up and to the left."""
        dy, dx = rng.integers(-self.pad, self.pad + 1, size=2).tolist()
        return dy, dx

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return torch.from_numpy(moved(image.numpy(), *self.draw(rng)))


def moved(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """A copy of ``image`` (3, H, W), moved up by ``dy`` and to the left by ``dx``; what comes in is 0."""
    height, width = image.shape[-2:]
    out = np.zeros(image.shape, image.dtype)
    if abs(dy) < height and abs(dx) < width:
        source = image[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
        out[:, max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)] = source
    return out


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, each times U(1 - strength, 1 + strength), in random order; no hue.

    Each moves the pixels along the line from something duller through the image: from black, from the image's mean
    grey, from every pixel's own grey. Values are clipped to [0, 255] after each and rounded once, at the end.
    torchvision's functions give the same up to their rounding (they truncate after each step) and take twice as long.
    """

    strength: float

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        x = image.numpy().astype(np.float32)
        for which in rng.permutation(3):
            factor = np.float32(rng.uniform(max(0.0, 1.0 - self.strength), 1.0 + self.strength))
            dull = None  # black
            if which > 0:
                grey = _luminance(x)
                dull = grey.mean() if which == 1 else grey
            x *= factor
            if dull is not None:
                x += dull * (1 - factor)
            np.maximum(x, np.float32(0), out=x)
            np.minimum(x, np.float32(255), out=x)
        return torch.from_numpy(np.rint(x, out=x).astype(np.uint8))


@dataclass(frozen=True)
class Grey:
    """Luminance copied to all three channels with probability ``p`` (1 for the grey branch of CACL)."""

    p: float = 1.0

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if rng.random() >= self.p:
            return image
        grey = np.rint(_luminance(image.numpy())).astype(np.uint8)
        return torch.from_numpy(grey).repeat(3, 1, 1)


def _luminance(image: np.ndarray) -> np.ndarray:
    """(3, H, W) to (H, W) float32, with the weights of ITU-R BT.601, as Pillow's and torchvision's grey."""
    red, green, blue = image
    grey = np.float32(0.299) * red
    grey += np.float32(0.587) * green
    grey += np.float32(0.114) * blue
    return grey


@dataclass(frozen=True)
class Blur:
    """With probability ``p`` a Gaussian blur of standard deviation U(*radius) pixels, as Pillow computes it (ICE)."""

    p: float = 0.5
    radius: tuple[float, float] = (0.1, 2.0)

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if rng.random() >= self.p:
            return image
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*self.radius)))
        return torch.from_numpy(np.array(blurred)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Normalize:
    """uint8 to float32: (x / 255 - mean) / std for each channel."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        mean = torch.tensor(self.mean, dtype=torch.float32)[:, None, None]
        std = torch.tensor(self.std, dtype=torch.float32)[:, None, None]
        return image.to(torch.float32).div_(255.0).sub_(mean).div_(std)

    def write(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """The same of ``pixels`` (3, H, W) uint8, to the bit, into ``out`` float32."""
        np.divide(pixels, np.float32(255), out=out, dtype=np.float32)
        out -= np.array(self.mean, np.float32)[:, None, None]
        out /= np.array(self.std, np.float32)[:, None, None]


def normalize_by(pixel_norm: str) -> Normalize:
    """The step for ``Config.pixel_norm``."""
    return Normalize(*mean_and_std(pixel_norm))


@dataclass(frozen=True)
class Erase:
    """Random erasing (Zhong et al., AAAI 2020) as the published Re-ID code does it, after ``Normalize``.

    torchvision's RandomErasing is another recipe: it draws the aspect ratio log-uniformly; here it is uniform. The
    fill is the ImageNet mean written into *normalised* pixels, a slightly bright patch, neither black nor the mean.

    Attributes:
        p: probability that the image is touched.
        area: fraction of the image, uniform.
        aspect: height over width, uniform.
        fill: one value for each channel.
        tries: rectangles drawn before giving up on one that fits strictly inside.
    """

    p: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    fill: tuple[float, float, float] = IMAGENET_MEAN
    tries: int = 100

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[slice, slice] | None:
        """Rows and columns of the rectangle in an image of ``height`` and ``width``; None to leave it as it is."""
        if rng.random() >= self.p:
            return None
        for _ in range(self.tries):
            area = rng.uniform(*self.area) * height * width
            aspect = rng.uniform(*self.aspect)
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h < height and w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                return slice(top, top + h), slice(left, left + w)
        return None

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        place = self.draw(rng, *image.shape[-2:])
        if place is None:
            return image
        image = image.clone()
        image[:, place[0], place[1]] = torch.tensor(self.fill)[:, None, None]
        return image


@dataclass(frozen=True)
class View:
    """A size and the steps that follow the resize; the loader resizes, so views of one image share that work."""

    height: int
    width: int
    steps: tuple[Step, ...]

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """(3, height, width) uint8 to float32 of the same shape."""
        for step in self.steps:
            image = step(image, rng)
        return image


def train_transform(
    height: int = 256,
    width: int = 128,
    *,
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
    erase_area: tuple[float, float] = (0.02, 0.4),
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3),
    erase_fill: tuple[float, float, float] = IMAGENET_MEAN,
    color_jitter: float = 0.0,
    grey: float = 0.0,
    blur: float = 0.0,
    pixel_norm: str = "imagenet",
) -> View:
    """The training view of SpCL, Cluster Contrast and most of the family; a step of strength 0 is left out.

    Args:
        height, width: size in pixels; resize is bicubic.
        flip: probability of mirroring.
        pad: largest shift in pixels, filled with black.
        erase: probability of random erasing (ICE 0.6).
        erase_area: range of the erased fraction (CAP (0.02, 0.2)).
        erase_aspect: range of the erased rectangle's height over width (CAP (0.3, 3)).
        erase_fill: what is written, in normalised units; (0, 0, 0) is the data mean.
        color_jitter: strength of brightness, contrast and saturation jitter.
        grey: probability of a grey image.
        blur: probability of a Gaussian blur (ICE 0.5).
        pixel_norm: "imagenet", "half" (mean and deviation 0.5), "clip", or six numbers with commas between them.

    Raises:
        ValueError: a size that is not positive, a probability outside [0, 1], or an unknown ``pixel_norm``.
    """
    _check("train_transform", height, width, pixel_norm)
    for name, p in (("flip", flip), ("erase", erase), ("grey", grey), ("blur", blur)):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"train_transform: {name} must lie in [0, 1], got {p}")
    if color_jitter < 0 or pad < 0:
        raise ValueError(f"train_transform: color_jitter and pad must not be negative, got {color_jitter} and {pad}")
    steps: list[tuple[float, Step]] = [
        (color_jitter, ColorJitter(color_jitter)),
        (grey, Grey(grey)),
        (flip, Flip(flip)),
        (pad, PadCrop(pad)),
        (blur, Blur(blur)),
        (1.0, normalize_by(pixel_norm)),
        (erase, Erase(erase, area=erase_area, aspect=erase_aspect, fill=erase_fill)),
    ]
    return View(height, width, tuple(step for strength, step in steps if strength > 0))


def test_transform(height: int = 256, width: int = 128, *, pixel_norm: str = "imagenet") -> View:
    """Resize and normalise, nothing random: for features, evaluation and the weak view of ICE."""
    _check("test_transform", height, width, pixel_norm)
    return View(height, width, (normalize_by(pixel_norm),))


test_transform.__test__ = False  # or pytest collects it wherever it is imported


def _check(op: str, height: int, width: int, pixel_norm: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"{op}: height and width must be positive, got {height} and {width}")
    if not is_pixel_norm(pixel_norm):
        raise ValueError(f"{op}: pixel_norm must {RULE}, got {pixel_norm!r}")

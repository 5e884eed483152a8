# SPDX-License-Identifier: Apache-2.0
"""From a file to uint8 RGB pixels, whatever the file is; what cannot be read is a named error, not a crash."""

import io
import os
import stat
import struct

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin  # noqa: F401 (the last two register themselves)

Image.preinit()  # registers the common formats

# Raster decoders only. Pillow also knows formats that run outside programs (EPS), which a crop never is.
_FORMATS = tuple(form for form in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF") if form in Image.OPEN)

MAX_PIXELS = 64_000_000  # 192 MB of RGB; a crop is a thousand times smaller, so more is a mistake or an attack

# What Pillow's decoders raise on damaged files: OSError if unidentified, truncated, vanished or unreadable, and less
# tidy ones that fuzzing brings out (tests/data/test_images.py).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_ORIENTATION = 0x0112  # EXIF tag
_SPARE = 2  # times the wanted size that a JPEG is decoded to at least, in both directions, where it is larger


class BadImage(ValueError):
    """An image file that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that it survives the way back from a worker process
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_rgb(path: str | os.PathLike, *, truncated: bool = False, wanted: tuple[int, int] | None = None) -> Image.Image:
    """Decode a file to an 8-bit RGB image, upright.

    CMYK, palette and grey are converted; 16-bit grey keeps its upper 8 bits; transparent pixels are laid on black;
    the EXIF orientation is applied. At most ``MAX_PIXELS`` pixels, checked before anything is decoded.

    Args:
        path: the file.
        truncated: take a file that ends early as far as it goes, with the pixels that Pillow gives under its
            process-wide ``LOAD_TRUNCATED_IMAGES``, which is not touched. What is missing is grey or smeared in a
            JPEG, black in other formats.
        wanted: (height, width) to which the image is going to be resized. A colour JPEG that is four times as large or
            more, in both directions, is decoded at an eighth, a quarter or half of its size, whichever is the smallest
            that leaves twice the wanted one; libjpeg averages pixels for that, in a fraction of the time.

    Raises:
        BadImage: empty, truncated (unless that is allowed and the header is whole), not an image, not a regular file,
            too large, or no longer there.
    """
    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise BadImage(path, "not a file")
        with Image.open(path, formats=_FORMATS) as image:
            _refuse_large(path, image)
            _scale_down(image, wanted)
            return upright_rgb(path, _loaded(path, image, wanted) if truncated else image)
    except BadImage:
        raise
    except _DECODE_ERRORS as error:
        raise BadImage(path, _reason(path, error)) from error


def _scale_down(image: Image.Image, wanted: tuple[int, int] | None) -> None:
    """Have a JPEG that was opened decoded at a fraction of its size, where that leaves enough (``read_rgb``)."""
    if wanted is None or image.format != "JPEG" or image.mode != "RGB":
        return
    height, width = wanted
    if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):  # stored on its side
        height, width = width, height
    if image.height >= 2 * _SPARE * height and image.width >= 2 * _SPARE * width:
        image.draft("RGB", (_SPARE * width, _SPARE * height))


def _loaded(path: str, image: Image.Image, wanted: tuple[int, int] | None) -> Image.Image:
    """``image`` of the file at ``path``, decoded as far as the file goes."""
    try:
        image.load()
        return image
    except OSError as error:
        if not str(error).startswith("image file is truncated"):
            raise
    if image.format in ("JPEG", "MPO"):  # with the mark of its end, libjpeg fills up what is missing
        with open(path, "rb") as file:
            whole = Image.open(io.BytesIO(file.read() + b"\xff\xd9"), formats=_FORMATS)
        _scale_down(whole, wanted)
        return whole
    image.tile = []  # nothing is left to decode: what was decoded is the picture
    return image


def _refuse_large(path: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(path, f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")


def upright_rgb(path: str, image: Image.Image) -> Image.Image:
    """What ``read_rgb`` makes of an opened ``image``; ``path`` names it in the error. The decoder's errors pass."""
    _refuse_large(path, image)
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return _to_rgb(path, image)


def _to_rgb(path: str, image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip at 255 and give a white picture
        pixels = np.asarray(image).astype(np.int64)
        deep = pixels.max(initial=0) > 255
        return Image.fromarray((pixels >> 8 if deep else pixels).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage(path, "floating-point pixels, whose range is not defined")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _reason(path: str, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format that is not read"
    return f"cannot be decoded ({type(error).__name__}: {error})"


def read_pixels(path: str | os.PathLike, height: int, width: int, *, truncated: bool = False) -> torch.Tensor:
    """Decode and resize: (3, height, width) uint8, bicubic as Pillow computes it (the published pipelines do).

    Large JPEGs are decoded at a fraction of their size (``read_rgb``); docs/quirks.md has the difference.
    """
    return resized_pixels(read_rgb(path, truncated=truncated, wanted=(height, width)), height, width)


def resized_pixels(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """An RGB image as (3, height, width) uint8; see ``read_pixels``."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))

# SPDX-License-Identifier: Apache-2.0
"""Decoding: every kind of pixel to upright RGB, and nothing that a damaged file can do but raise ``BadImage``."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fastreid_u.data import BadImage, read_rgb
from fastreid_u.data.images import read_pixels


@pytest.fixture
def picture():
    """Smooth, so that JPEG hardly changes it; red above, blue below."""
    rows = np.linspace(0, 255, 24, dtype=np.uint8)[:, None].repeat(12, 1)
    return Image.fromarray(np.dstack([255 - rows, np.full_like(rows, 60), rows]))


def pixels(path):
    return np.asarray(read_rgb(path)).astype(int)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="not a file"):
        read_rgb(tmp_path / "a.jpg")


def test_rgb_as_it_is(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture))


def test_cmyk(tmp_path, picture):
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "a.jpg") - np.asarray(picture)).max() < 12


def test_grey_and_palette_and_bilevel(tmp_path, picture):
    picture.convert("L").save(tmp_path / "l.jpg")
    picture.quantize(64).save(tmp_path / "p.png")
    picture.convert("1").save(tmp_path / "1.png")
    assert np.ptp(pixels(tmp_path / "l.jpg"), axis=2).max() == 0
    assert np.abs(pixels(tmp_path / "p.png") - np.asarray(picture)).mean() < 6
    assert set(np.unique(pixels(tmp_path / "1.png"))) == {0, 255}


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path, suffix):
    """Pillow's own conversion clips at 255, which turns such a file white."""
    deep = np.linspace(0, 65535, 24 * 12).reshape(24, 12).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), (deep >> 8)[:, :, None].repeat(3, 2))


def test_transparent_pixels_are_black(tmp_path, picture):
    rgba = np.dstack([np.asarray(picture), np.full((24, 12), 255, np.uint8)])
    rgba[:12, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    out = pixels(tmp_path / "a.png")
    assert not out[:12].any()
    assert np.array_equal(out[12:], np.asarray(picture)[12:])


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 0, 0, 0, 1, 1, 1, 1])
    image.save(tmp_path / "a.png", transparency=0)
    out = pixels(tmp_path / "a.png")
    assert not out[0].any()
    assert (out[1] == [0, 255, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, picture, orientation):
    """Orientation k says how the stored pixels must be turned to stand upright; store them turned back."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture.transpose(undo[orientation]) if orientation in undo else picture
    stored.save(tmp_path / "a.jpg", quality=100, exif=exif)
    assert pixels(tmp_path / "a.jpg").shape == (24, 12, 3)
    assert np.abs(pixels(tmp_path / "a.jpg") - np.asarray(picture)).max() < 20


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "a.png")
    out = read_pixels(tmp_path / "a.png", 8, 4)
    assert out.dtype == torch.uint8
    assert out.shape == (3, 8, 4)
    assert out[:, 0, 0].tolist() == [10, 20, 30]


def huge_png(width, height):
    """A PNG that claims to be huge; its pixels are missing, because the header must be enough to refuse it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [8_500, 20_000])  # just above our limit; above the one at which Pillow itself raises
def test_decompression_bomb(tmp_path, side):
    (tmp_path / "a.png").write_bytes(huge_png(side, side))
    with pytest.raises(BadImage, match="pixels"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello, this is text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would start Ghostscript
        (b"\xff\xd8\xff\xe0", "not an image"),
    ],
)
def test_not_an_image(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=reason) as caught:
        read_rgb(tmp_path / "a.jpg")
    assert caught.value.path == str(tmp_path / "a.jpg")


def test_vanished_or_a_folder(tmp_path):
    with pytest.raises(BadImage, match="file not found"):
        read_rgb(tmp_path / "gone.jpg")
    with pytest.raises(BadImage):
        read_rgb(tmp_path)


def test_floating_point_pixels(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match="floating-point"):
        read_rgb(tmp_path / "a.tif")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow says of broken TIFF tags
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # changed bytes may give any width
@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM"])
def test_damage_raises_bad_image_or_nothing(tmp_path, picture, form):
    """Cut anywhere, or with random bytes changed: a decoder may still make a picture, or say so in one way only."""
    buffer = io.BytesIO()
    picture.save(buffer, form)
    whole, path = buffer.getvalue(), tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    refused = []
    for trial in range(150):
        data = bytearray(whole)
        if trial % 2:
            data = data[: rng.integers(len(data))]
        for _ in range(3):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            assert read_rgb(path).mode == "RGB"
        except BadImage as error:
            refused.append(error.reason)
    assert len(refused) > 30
    assert all(refused)


def test_bad_image_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImage("p.jpg", "why")))
    assert (error.path, error.reason, str(error)) == ("p.jpg", "why", "p.jpg: why")


@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.parametrize(
    ("suffix", "settings"), [("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("bmp", {}), ("tif", {})]
)
def test_a_file_that_ends_early_is_used_on_request_only(tmp_path, monkeypatch, suffix, settings, share):
    """With the pixels that Pillow gives under its global switch, which stays as it is."""
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **settings)
    os.truncate(path, int(os.path.getsize(path) * share))
    with pytest.raises(BadImage, match="truncated"):
        read_rgb(path)
    got = np.asarray(read_rgb(path, truncated=True))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(BadImage, match="truncated"):
        read_rgb(path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(path) as image:
        assert np.array_equal(got, np.asarray(image.convert("RGB")))
    assert read_pixels(path, 8, 4, truncated=True).shape == (3, 8, 4)


def test_what_is_no_image_stays_bad_where_files_may_end_early(tmp_path, picture):
    picture.save(tmp_path / "head.jpg")
    os.truncate(tmp_path / "head.jpg", 30)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    for name in ("head.jpg", "empty.jpg", "text.jpg", "gone.jpg"):
        with pytest.raises(BadImage):
            read_rgb(tmp_path / name, truncated=True)

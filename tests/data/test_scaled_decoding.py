# SPDX-License-Identifier: Apache-2.0
"""Large JPEGs are decoded at a fraction of their size; crops of ordinary size keep every bit."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_u.data import PixelCache, Sample, make_loader, read_rgb, test_transform
from fastreid_u.data.images import read_pixels, resized_pixels

WANTED = (32, 16)


def photo(height, width):
    """Smooth shapes of many sizes with a little noise, as photographs have."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(rng.uniform(2, 60) * (x * np.cos(a) + y * np.sin(a)) + a) for a in rng.uniform(0, 6, 30)]
    planes = [sum(waves[i::3]) * 12 + 128 + rng.normal(0, 3, (height, width)) for i in range(3)]
    return Image.fromarray(np.stack(planes, axis=2).clip(0, 255).astype(np.uint8))


def whole(path):
    return resized_pixels(read_rgb(path), *WANTED)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((128, 64), (64, 32)),  # four times: half is twice the wanted size
        ((127, 64), (127, 64)),
        ((128, 63), (128, 63)),
        ((1000, 70), (500, 35)),  # the tighter direction decides
        ((250, 130), (125, 65)),
        ((256, 128), (64, 32)),
        ((600, 300), (75, 38)),  # an eighth, rounded up
        ((1000, 500), (125, 63)),  # no less than an eighth
    ],
)
def test_twice_the_wanted_size_is_left(tmp_path, size, decoded):
    photo(*size).save(tmp_path / "a.jpg")
    assert read_rgb(tmp_path / "a.jpg", wanted=WANTED).size == decoded[::-1]
    assert read_rgb(tmp_path / "a.jpg").size == size[::-1]
    same = torch.equal(read_pixels(tmp_path / "a.jpg", *WANTED), whole(tmp_path / "a.jpg"))
    assert same == (decoded == size)


@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_differ_by_less_than_one_in_the_mean(tmp_path, progressive):
    for scale in (4, 5, 8, 16, 23):
        photo(32 * scale, 16 * scale).save(tmp_path / "a.jpg", quality=90, progressive=progressive)
        apart = (read_pixels(tmp_path / "a.jpg", *WANTED).int() - whole(tmp_path / "a.jpg").int()).abs()
        assert 0 < apart.float().mean() < 1
        assert apart.max() < 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_lies_on_its_side_is_measured_upright(tmp_path, orientation):
    """64 x 250 upright is twice as wide as wanted, not four times: it is decoded whole, however it is stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size, scaled in (((250, 63), False), ((250, 64), True)):
        stored = size[::-1] if orientation > 4 else size
        photo(*stored).save(tmp_path / "a.jpg", exif=exif)
        assert read_rgb(tmp_path / "a.jpg", wanted=WANTED).size == ((32, 125) if scaled else size[::-1])


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGB", "webp")])
def test_other_images_are_decoded_whole(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    photo(256, 128).convert(mode).save(path)
    assert read_rgb(path, wanted=WANTED).size == (128, 256)
    assert torch.equal(read_pixels(path, *WANTED), whole(path))


def test_a_file_that_ends_early_is_scaled_too(tmp_path):
    path = tmp_path / "a.jpg"
    photo(256, 128).save(path)
    intact = read_pixels(path, *WANTED)
    os.truncate(path, os.path.getsize(path) * 3 // 4)
    assert read_rgb(path, truncated=True, wanted=WANTED).size == (32, 64)
    got = read_pixels(path, *WANTED, truncated=True)
    assert torch.equal(got[:, :16], intact[:, :16])
    assert not torch.equal(got, intact)


def test_cached_and_read_anew_are_the_same(tmp_path):
    photo(256, 128).save(tmp_path / "a.jpg")
    sample = Sample(str(tmp_path / "a.jpg"), 0, 0)
    cache = PixelCache(1, *WANTED)
    batches = [
        next(iter(make_loader([sample], test_transform(*WANTED), batch_size=1, cache=kept))) for kept in (False, cache)
    ]
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(cache.pixels[0], read_pixels(sample.path, *WANTED))

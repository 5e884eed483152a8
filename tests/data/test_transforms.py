# SPDX-License-Identifier: Apache-2.0
"""Views: each step against its definition."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_u.data import test_transform, train_transform
from fastreid_u.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Blur,
    ColorJitter,
    Erase,
    Flip,
    Grey,
    Normalize,
    PadCrop,
)


def noise(height=32, width=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def rng(seed=0):
    return np.random.default_rng(seed)


def test_test_view_is_normalised_pixels_and_nothing_else():
    image = noise()
    expected = (image.double() / 255 - torch.tensor(IMAGENET_MEAN).double()[:, None, None]) / torch.tensor(
        IMAGENET_STD
    ).double()[:, None, None]
    out = test_transform(32, 16)(image, rng())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


def test_flip_mirrors_half_of_the_images():
    image, generator = noise(), rng()
    outs = [Flip(0.5)(image, generator) for _ in range(400)]
    mirrored = sum(torch.equal(out, image.flip(-1)) for out in outs)
    assert mirrored + sum(torch.equal(out, image) for out in outs) == 400
    assert abs(mirrored - 200) < 5 * 10  # binomial, standard deviation 10


def test_pad_crop_equals_padding_then_cropping():
    image, pad = noise(12, 8), 3
    padded = torch.nn.functional.pad(image, (pad,) * 4)
    crops = {padded[:, y : y + 12, x : x + 8].numpy().tobytes(): (y, x) for y in range(7) for x in range(7)}
    generator = rng()
    seen = {crops[PadCrop(pad)(image, generator).numpy().tobytes()] for _ in range(600)}
    assert len(seen) == 49  # every offset occurs, no other picture does


def test_pad_crop_of_a_tiny_image():
    image = noise(2, 1)
    for seed in range(50):
        assert PadCrop(10)(image, rng(seed)).shape == (3, 2, 1)


class TestErase:
    def erased(self, step, height=256, width=128, seed=0):
        """(height, width) of the erased rectangle, or None; checks that it is one full rectangle of the fill."""
        out = step(torch.full((3, height, width), 9.0), rng(seed))
        rows, columns = np.nonzero((out[0] != 9).numpy())
        if len(rows) == 0:
            return None
        top, left, h, w = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
        patch = out[:, top : top + h, left : left + w]
        assert torch.equal(patch, torch.tensor(step.fill)[:, None, None].expand_as(patch))
        assert len(rows) == h * w
        return h, w

    def test_area_and_aspect_are_uniform(self):
        """Where every rectangle fits, area and aspect follow their uniform laws (Kolmogorov-Smirnov distance)."""
        step = Erase(1.0, area=(0.02, 0.1))
        sides = [self.erased(step, 256, 256, seed) for seed in range(800)]
        area = np.array([h * w / 256**2 for h, w in sides])
        aspect = np.array([h / w for h, w in sides])
        for values, (low, high) in ((area, (0.02, 0.1)), (aspect, (0.3, 1 / 0.3))):
            uniform = (np.sort(values) - low) / (high - low)
            distance = np.abs(uniform - (np.arange(800) + 0.5) / 800).max()
            assert distance < 1.63 / 800**0.5 + 0.01, distance  # 1 % level, and rounding to whole pixels
        log_uniform = (np.sort(np.log(aspect)) - np.log(0.3)) / (2 * np.log(1 / 0.3))
        assert np.abs(log_uniform - (np.arange(800) + 0.5) / 800).max() > 0.1  # torchvision's law is told apart

    def test_probability(self):
        hits = sum(self.erased(Erase(0.5), 64, 32, seed) is not None for seed in range(400))
        assert abs(hits - 200) < 50

    def test_rectangle_lies_strictly_inside(self):
        for seed in range(100):
            h, w = self.erased(Erase(1.0), 64, 16, seed)
            assert h < 64
            assert w < 16

    def test_gives_up_when_nothing_fits(self):
        assert self.erased(Erase(1.0, area=(1.0, 1.0)), 8, 8) is None

    def test_places_are_uniform_and_reach_the_border(self):
        step, corners = Erase(1.0, area=(0.25, 0.25), aspect=(1.0, 1.0)), set()
        for seed in range(300):
            out = step(torch.full((3, 8, 8), 9.0), rng(seed))
            rows, columns = np.nonzero((out[0] != 9).numpy())
            corners.add((rows.min(), columns.min()))
        assert corners == {(y, x) for y in range(5) for x in range(5)}

    def test_the_input_is_left_alone(self):
        image = torch.zeros(3, 16, 16)
        Erase(1.0)(image, rng())
        assert not image.any()

    def test_fill_is_the_mean_in_normalised_units(self):
        """Published: (0.485, 0.456, 0.406) after normalisation, about 0.45 sigma; neither black nor the mean."""
        black = test_transform(64, 32)(torch.zeros(3, 64, 32, dtype=torch.uint8), rng())
        view = train_transform(64, 32, flip=0, pad=0, erase=1.0)
        out = view(torch.zeros(3, 64, 32, dtype=torch.uint8), rng())
        changed = out[:, (out != black).any(0)]
        assert changed.shape[1] > 0
        assert torch.equal(changed, torch.tensor(IMAGENET_MEAN)[:, None].expand_as(changed))


def test_color_jitter_matches_its_definition():
    """Brightness, contrast and saturation only: a grey image stays grey, and strength 0 changes nothing."""
    image = noise()
    assert torch.equal(ColorJitter(0.0)(image, rng()), image)
    grey = image[:1].expand(3, -1, -1).contiguous()
    for seed in range(10):
        out = ColorJitter(0.5)(grey, rng(seed))
        assert (out.amax(0).int() - out.amin(0).int()).max() <= 1
        assert out.dtype == torch.uint8
    means = [ColorJitter(0.5)(image, rng(seed)).float().mean() for seed in range(40)]
    assert max(means) / min(means) > 1.5


@pytest.mark.parametrize("strength", [0.2, 0.5])
def test_color_jitter_is_that_of_torchvision(strength):
    """Its functions on floating-point images, which they do not round; on uint8 they truncate after each of 3 steps."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional", reason="torchvision is not installed")
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    image = noise(40, 24)
    for seed in range(60):
        expected, generator = image.float() / 255, rng(seed)
        for which in generator.permutation(3):
            expected = adjust[which](expected, generator.uniform(1 - strength, 1 + strength))
        got = ColorJitter(strength)(image, rng(seed))
        assert (got - 255 * expected).abs().max() <= 1


def test_steps_leave_their_input_alone():
    """It may be the loader's cache."""
    image = noise()
    before = image.clone()
    for step in (ColorJitter(0.5), Grey(1.0), Flip(1.0), PadCrop(3), Blur(1.0), Normalize()):
        step(image, rng())
        assert torch.equal(image, before), step


def test_grey_is_luminance_on_all_channels():
    image = noise()
    out = Grey(1.0)(image, rng())
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])
    pillow = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")).astype(int)
    assert np.abs(out[0].numpy().astype(int) - pillow).max() <= 1


def test_blur_smooths_and_keeps_the_mean():
    image = noise(64, 32)
    blurred = [Blur(0.5)(image, rng(seed)) for seed in range(40)]
    changed = [out for out in blurred if not torch.equal(out, image)]
    assert 8 < len(changed) < 32
    for out in changed:
        assert out.float().std() < image.float().std()
        assert abs(out.float().mean() - image.float().mean()) < 2


def test_views_hold_the_published_steps():
    def names(view):
        return [type(step).__name__ for step in view.steps]

    assert names(train_transform()) == ["Flip", "PadCrop", "Normalize", "Erase"]
    assert names(train_transform(erase=0, color_jitter=0.3)) == ["ColorJitter", "Flip", "PadCrop", "Normalize"]
    assert names(train_transform(blur=0.5)) == ["Flip", "PadCrop", "Blur", "Normalize", "Erase"]
    assert names(train_transform(grey=1.0)) == ["Grey", "Flip", "PadCrop", "Normalize", "Erase"]
    assert names(test_transform()) == ["Normalize"]
    assert train_transform(erase=0.6).steps[-1].p == 0.6
    assert train_transform(erase_aspect=(0.3, 3.0)).steps[-1].aspect == (0.3, 3.0)
    assert train_transform().steps[-1] == Erase(0.5, (0.02, 0.4), (0.3, 1 / 0.3), IMAGENET_MEAN, 100)
    assert (train_transform().height, train_transform().width) == (256, 128)


def test_vit_normalisation():
    view = test_transform(4, 4, pixel_norm="half")
    image = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(view(image, rng()), torch.ones(3, 4, 4))
    assert Normalize().mean == IMAGENET_MEAN


def test_same_generator_state_gives_the_same_view():
    view, image = train_transform(32, 16, color_jitter=0.4, blur=0.5), noise()
    torch.manual_seed(0)
    first = view(image, rng(7))
    torch.manual_seed(1)
    assert torch.equal(view(image, rng(7)), first)
    assert not torch.equal(view(image, rng(8)), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "height and width must be positive, got 0 and 128"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"erase": -0.1}, "erase must lie"),
        ({"color_jitter": -1.0}, "must not be negative"),
        ({"pixel_norm": "whole"}, r"pixel_norm must be one of imagenet, half, clip or six numbers .*, got 'whole'"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_transform(**arguments)

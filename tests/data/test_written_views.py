# SPDX-License-Identifier: Apache-2.0
"""Views written into a batch: the bits and the draws of the same view's steps, one after the other."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_u.data import Sample, make_loader, test_transform, train_transform
from fastreid_u.data.images import read_pixels
from fastreid_u.data.transforms import Erase, Flip, Normalize, PadCrop, View
from fastreid_u.data.written_views import written

VIEWS = {
    "published": train_transform(24, 12),
    "nothing random": test_transform(24, 12, pixel_norm="half"),
    "everything": train_transform(
        24, 12, color_jitter=0.4, grey=0.3, blur=0.5, erase_fill=(0, 0, 0), pixel_norm="clip"
    ),
    "ICE": train_transform(24, 12, blur=0.5, erase=0.6),
    "shifted out of the picture": train_transform(24, 12, pad=30, flip=0),
    "all mirrored": train_transform(24, 12, pad=0, flip=1.0, erase=0.0),
    "another order": View(24, 12, (PadCrop(2), Flip(), Normalize())),
}


def noise(count: int) -> list[torch.Tensor]:
    return list(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 24, 12), dtype=np.uint8)))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_bits_and_draws_are_those_of_the_steps(view):
    form = written(view)
    for position, image in enumerate(noise(60)):
        before, out = image.clone(), np.full((3, 24, 12), np.nan, np.float32)
        theirs, ours = np.random.default_rng((7, position)), np.random.default_rng((7, position))
        form.write(image, ours, out)
        assert torch.equal(torch.from_numpy(out), view(image, theirs))
        assert ours.bit_generator.state == theirs.bit_generator.state  # the next view draws from it
        assert torch.equal(image, before)  # it may be the loader's cache
        assert form.draws or ours.bit_generator.state == np.random.default_rng((7, position)).bit_generator.state


def test_every_pixel_value_is_normalised_to_the_same_bits():
    every = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 16, 16)
    for norm in ("imagenet", "half", "clip", "0.1,0.2,0.3,0.4,0.5,0.6"):
        view, out = test_transform(16, 16, pixel_norm=norm), np.empty((3, 16, 16), np.float32)
        written(view).write(every, None, out)
        assert torch.equal(torch.from_numpy(out), view(every, np.random.default_rng()))


class OwnFlip(Flip):
    pass


@pytest.mark.parametrize(
    "steps", [(OwnFlip(), Normalize()), (lambda image, rng: image, Normalize()), (Flip(),), (Erase(), Normalize())]
)
def test_steps_of_ones_own_go_the_plain_way(steps):
    assert written(View(24, 12, steps)) is None


def test_a_loader_gives_the_steps_of_each_view_in_turn(tmp_path):
    """Two views of an image, one of them with a step of its own, draw from one generator; a bad image leaves no gap."""
    samples = [Sample(str(tmp_path / f"{i}.png"), 0, 0) for i in range(5)]
    for i, sample in enumerate(samples):
        Image.fromarray(noise(5)[i].permute(1, 2, 0).numpy()).save(sample.path)
    (tmp_path / "1.png").write_bytes(b"")
    own = View(24, 12, (lambda image, rng: image.clamp(max=int(rng.integers(100, 200))), Normalize()))
    views = (train_transform(24, 12), own, VIEWS["everything"])
    for workers in (0, 1):
        [loaded] = make_loader(samples, views, batch_size=5, seed=3, workers=workers)
        assert loaded.indices.tolist() == [0, 2, 3, 4]
        for row, index in enumerate(loaded.indices.tolist()):
            rng, pixels = np.random.default_rng((3, index)), read_pixels(samples[index].path, 24, 12)
            for view, images in zip(views, loaded.views, strict=True):
                assert torch.equal(images[row], view(pixels, rng))

# SPDX-License-Identifier: Apache-2.0
"""A set of images: features in its order, batches for training, images that cannot be read."""

import io

import pytest
import torch

from fastreid_u.data import Sample, train_transform
from fastreid_u.data import test_transform as transform
from fastreid_u.engine.device import Machine
from fastreid_u.engine.display import Display
from fastreid_u.engine.image_set import BAD_SHARE, ImageSet, Reading, TooManyBadImages


class Mean(torch.nn.Module):
    """Mean colour as a feature."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


def machine():
    return Machine(torch.device("cpu"), False, Display(stream=io.StringIO()))


def image_set(folder, names, bad_share=BAD_SHARE, **reading):
    samples = tuple(Sample(str(folder / name), -1, 0) for name in names)
    return ImageSet(samples, Reading(transform(8, 4), batch_size=2, **reading), machine(), bad_share=bad_share)


@pytest.mark.parametrize("cache", [False, True])
def test_features_stand_in_the_order_of_the_samples(plant, cache):
    folder = plant("crops", "a.jpg", "b.jpg", "c.jpg")
    images = image_set(folder, ["c.jpg", "gone.jpg", "a.jpg"], bad_share=1.0, cache=cache)
    network = Mean().train()
    features = images.features(network)
    assert (features.shape, features.dtype) == ((3, 3), torch.float32)
    assert torch.isfinite(features).all(dim=1).tolist() == [True, False, True]
    assert not network.training
    assert list(images.bad.reasons) == [str(folder / "gone.jpg")]
    assert images.machine.display.stream.getvalue().count("gone.jpg") == 1
    images.features(network)
    assert images.machine.display.stream.getvalue().count("gone.jpg") == 1, "named once"


def test_a_set_without_a_readable_image_is_refused(plant):
    images = image_set(plant("crops", "a.jpg"), ["gone.jpg"], bad_share=1.0)
    with pytest.raises(ValueError, match=r"check: images must hold one that can be read, got 1 that .*gone.jpg"):
        images.features(Mean(), "check")
    with pytest.raises(TooManyBadImages, match="1 of 1 images cannot be read, more than 5%"):
        image_set(plant("crops", "a.jpg"), ["gone.jpg"]).features(Mean())


def test_a_network_that_gives_no_numbers_is_named(plant):
    images = image_set(plant("crops", "a.jpg", "b.jpg"), ["a.jpg", "b.jpg"])
    with pytest.raises(FloatingPointError, match="extract: features of 2 of 2 images are NaN or infinite"):
        images.features(lambda_network(lambda x: Mean()(x) * torch.nan))


def lambda_network(forward):
    network = Mean()
    network.forward = forward
    return network


def test_train_batches_repeat_by_seed_and_note_what_cannot_be_read(plant):
    folder = plant("crops", "a.jpg", "b.jpg")
    views = (train_transform(8, 4, erase=0.9), transform(8, 4))
    images = image_set(folder, ["a.jpg", "gone.jpg", "b.jpg"], bad_share=1.0, train_views=views, train_batch_size=3)
    first, again, other = (list(images.train_batches([[2, 1, 0], [2]], seed)) for seed in ((1, 0), (1, 0), (1, 1)))
    assert [batch.indices.tolist() for batch in first] == [[2, 0], [2]]
    assert all(len(batch.images) == 2 for batch in first)
    assert torch.equal(first[0].images[0], again[0].images[0])
    assert not torch.equal(first[0].images[0], other[0].images[0])
    assert list(images.bad.reasons) == [str(folder / "gone.jpg")]


def test_close_ends_the_workers_of_both_loaders(plant):
    import multiprocessing

    folder = plant("crops", "a.jpg", "b.jpg")
    images = image_set(folder, ["a.jpg", "b.jpg"], train_views=(transform(8, 4),), train_batch_size=1, workers=1)
    before = set(multiprocessing.active_children())
    next(images.train_batches([[0], [1]], (1,)))
    images.features(Mean())
    assert len(set(multiprocessing.active_children()) - before) == 2
    images.close()
    assert set(multiprocessing.active_children()) <= before


def test_a_set_without_training_views_has_no_loader_for_them(plant):
    assert image_set(plant("crops", "a.jpg"), ["a.jpg"]).augmented is None

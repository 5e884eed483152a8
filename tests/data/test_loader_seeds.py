# SPDX-License-Identifier: Apache-2.0
"""A loader's seed is one or several whole numbers, of any integer type."""

import re

import numpy as np
import pytest
import torch

from fastreid_u.data import load_dataset, make_loader, train_transform


@pytest.fixture(scope="module")
def loader(tiny_world):
    return make_loader(load_dataset("market1501", tiny_world).train[:2], train_transform(64, 32), batch_size=2)


def images(loader, seed):
    return next(loader.epoch(seed=seed)).images


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), [3], (np.int32(3),)])
def test_the_type_of_a_seed_makes_no_difference(loader, seed):
    assert torch.equal(images(loader, seed), images(loader, 3))


@pytest.mark.parametrize("several", [np.array([3, 1]), torch.tensor([3, 1]), [np.int64(3), 1]])
def test_several_numbers_may_be_an_array(loader, several):
    assert torch.equal(images(loader, several), images(loader, (3, 1)))


@pytest.mark.parametrize("seed", [-1, 0.5, [1, None], ()])
def test_a_seed_that_is_none_is_refused_by_name(loader, seed):
    rule = f"make_loader: seed must be one or several integers of 0 or more, got {seed}"
    with pytest.raises(ValueError, match=re.escape(rule)):
        loader.epoch(seed=seed)

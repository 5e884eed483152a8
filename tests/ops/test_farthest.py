# SPDX-License-Identifier: Apache-2.0
"""Each row's largest distance, which ``rerank`` divides by, is found by a search for nearest rows."""

import numpy as np
import pytest
import torch

from fastreid_u.ops import _scaled_distance
from fastreid_u.ops.knn import knn

KINDS = {
    "noise": lambda x: x,
    "unit rows": lambda x: torch.nn.functional.normalize(x),
    "copies of the farthest": lambda x: torch.where(torch.arange(len(x))[:, None] < 30, 5 * x[:1], x),
    "few distinct": lambda x: x[torch.arange(len(x)) % 5],
    "all equal": lambda x: torch.ones_like(x),
    "all zero": lambda x: torch.zeros_like(x),
    "one outlier": lambda x: torch.where(torch.arange(len(x))[:, None] == 7, 1e9 * x, x),
    "common mean": lambda x: 1e-3 * x + 50,
    "tiny": lambda x: 1e-18 * x,
    "huge": lambda x: 1e17 * x,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_farthest_are_those_of_float64(kind, monkeypatch):
    monkeypatch.setattr(_scaled_distance, "_LEAST_ROWS", 64)
    x = KINDS[kind](torch.randn(150, 20, generator=torch.Generator().manual_seed(0)))
    found = _scaled_distance.FromFeatures(x[:40], x[40:], "sqeuclidean", knn)._farthest()
    y = x.double().numpy()
    expected = np.square(y[:, None] - y).sum(axis=2).max(axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-300)


def test_searched_rows_are_proven_or_left_open():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    source = _scaled_distance.FromFeatures(x[:40], x[40:], "sqeuclidean", knn)
    largest, left = source._farthest_by_search()
    assert len(left) == 0
    torch.testing.assert_close(largest, source._farthest_of_all(), rtol=1e-12, atol=0)
    source = _scaled_distance.FromFeatures(x[:40] * 0 + 1, -torch.ones(160, 16), "sqeuclidean", knn)
    assert len(source._farthest_by_search()[1]) == 200


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_measured_in_float64(kind):
    x = KINDS[kind](torch.randn(150, 20, generator=torch.Generator().manual_seed(2)))
    source = _scaled_distance.Unscaled(x[:40], x[40:], "sqeuclidean", knn)
    row, column = torch.randint(150, (2, 3000), generator=torch.Generator().manual_seed(3))
    found = source.pairs(row, column)
    y = x.double().numpy()
    np.testing.assert_allclose(found.numpy(), np.square(y[row] - y[column]).sum(axis=1), rtol=1e-12, atol=0)
    assert torch.equal(found, source.pairs(column, row))
    assert not found[(x[row] == x[column]).all(dim=1)].any()

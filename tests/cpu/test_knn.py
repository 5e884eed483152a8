# SPDX-License-Identifier: Apache-2.0
"""The CPU's search: products decide nothing that float64 would decide otherwise."""

import pytest
import torch

from fastreid_u.ops.knn import knn
from fastreid_u.reference import knn as reference_knn


@pytest.fixture
def float64_products():
    """The process-wide setting under which float32 products may not be trusted."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("float64_products")
def test_process_wide_rounding_of_products_does_not_reach_knn(clustered):
    x = clustered(300, 96, spread=0.9)
    found, expected = knn(x, 20, backend="numba"), reference_knn.knn(x, 20)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("float64_products")
def test_distances_that_round_to_one_float32_are_a_tie():
    x = torch.tensor([[0.0, 0.0], [1.0, 1e-5], [1.0, 0.0], [5.0, 5.0]])  # row 2 is nearer to row 0 by 1e-10
    sq_dist, index = knn(x, 2, backend="numba")
    assert sq_dist[0].tolist() == [0, 1]
    assert index[0].tolist() == [0, 1]


def test_products_too_coarse_to_rank_are_not_believed():
    """Two tight, distant groups: centring does not help, and float32 scores cannot tell the members of one apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(200, 64) + 1e-4 * torch.randn(200, 64, generator=generator)
    x[::2] *= -1
    found, expected = knn(x, 8, backend="numba"), reference_knn.knn(x, 8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e18, 2e18])
def test_knn_of_features_at_the_ends_of_float32(scale):
    x = (torch.rand(70, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1) * scale
    found, expected = knn(x, 9, backend="numba"), reference_knn.knn(x, 9)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])

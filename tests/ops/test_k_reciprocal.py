# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal encoding against the definition, set by set."""

import itertools

import numpy as np
import pytest
import torch

from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
from fastreid_u.ops.knn import knn
from fastreid_u.reference import k_reciprocal as reference


def by_definition(x, index, k1, k2):
    """Steps A to E with Python sets and float64 arrays."""
    n = len(x)
    k1, k2 = min(k1, n), min(k2, n)
    half = int(np.around(k1 / 2)) + 1
    full_list = [set(row[:k1].tolist()) for row in index]
    half_list = [set(row[:half].tolist()) for row in index]
    mutual = [{j for j in full_list[i] if i in full_list[j]} for i in range(n)]
    mutual_half = [{j for j in half_list[i] if i in half_list[j]} for i in range(n)]
    v = np.zeros((n, n))
    for i in range(n):
        members = set(mutual[i])
        for q in mutual[i]:
            if 3 * len(mutual_half[q] & mutual[i]) > 2 * len(mutual_half[q]):
                members |= mutual_half[q]
        members = sorted(members)
        if members:
            weight = np.exp(-((x[i] - x[members]) ** 2).sum(1))
            v[i, members] = weight / weight.sum()
    return v if k2 == 1 else np.stack([v[index[i, :k2]].mean(0) for i in range(n)])


@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 6), (25, 1), (15, 4), (9, 3), (5, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("n", [31, 64, 97])
def test_matches_definition(clustered, n, k1, k2):
    x = clustered(n, 12, number=n)
    sq_dist, index = knn(x, k1)
    v = k_reciprocal_encoding(x, k1, k2, knn=(sq_dist, index)).to_dense().numpy()
    expected = by_definition(x.double().numpy(), index.numpy(), k1, k2)
    np.testing.assert_array_equal(v > 0, expected > 0)
    np.testing.assert_allclose(v, expected, atol=5e-7, rtol=0)


def test_float64_reference_matches_definition_closely(clustered):
    x = clustered(70, 9, dtype=torch.float64)
    index = knn(x, 20)[1]
    v = reference.k_reciprocal_encoding(x, 20, 6, knn=(None, index)).to_dense().numpy()
    np.testing.assert_allclose(v, by_definition(x.numpy(), index.numpy(), 20, 6), atol=1e-14, rtol=0)


def test_two_thirds_exactly_is_not_enough():
    # R(0) = {0, 1, 2}, and of H(1) = {1, 2, 3} just two of three lie in it
    ranking = np.array([[0, 1, 2, 4], [1, 2, 3, 0], [2, 1, 4, 0], [3, 1, 4, 2], [4, 3, 1, 2]])
    sets = list(reference.reciprocal_sets(ranking, 4, 3))
    assert sets[0].tolist() == [0, 1, 2]


def test_layout(clustered):
    v = k_reciprocal_encoding(clustered(120, 16), 30, 6)
    assert (v.layout, v.dtype, tuple(v.shape)) == (torch.sparse_csr, torch.float32, (120, 120))
    torch.testing.assert_close(v.to_dense().sum(1), torch.ones(120), atol=1e-6, rtol=0)
    start, column = v.crow_indices(), v.col_indices()
    assert all((column[a:b].diff() > 0).all() for a, b in itertools.pairwise(start))


def test_row_length_bound(clustered):
    v = k_reciprocal_encoding(clustered(400, 6, spread=1.5), 30, 1)
    assert v.crow_indices().diff().max() <= 180


def test_lists_are_searched_when_not_given(clustered):
    x = clustered(80, 10)
    given = k_reciprocal_encoding(x, 12, 4, knn=knn(x, 25))
    assert torch.equal(given.to_dense(), k_reciprocal_encoding(x, 12, 4).to_dense())


def test_compat_changes_only_rows_that_are_not_unit(clustered):
    x = clustered(80, 10)
    near = k_reciprocal_encoding(x, compat=True).to_dense() - k_reciprocal_encoding(x).to_dense()
    assert near.abs().max() < 1e-6
    scaled = x * torch.linspace(0.7, 1.4, 80)[:, None]
    far = k_reciprocal_encoding(scaled, compat=True).to_dense() - k_reciprocal_encoding(scaled).to_dense()
    assert far.abs().max() > 1e-3


def test_far_apart_points_do_not_underflow():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) * 1e4
    v = k_reciprocal_encoding(x, 5, 2).to_dense()
    assert torch.isfinite(v).all()
    torch.testing.assert_close(v.sum(1), torch.ones(30))


def test_row_missing_from_its_own_list_is_empty():
    x = torch.zeros(4, 2)
    index = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])  # four copies, two slots: 2 and 3 never see themselves
    v = k_reciprocal_encoding(x, 2, 1, knn=(torch.zeros(4, 2), index)).to_dense()
    assert v[2:].abs().sum() == 0
    torch.testing.assert_close(v[:2].sum(1), torch.ones(2))


def test_empty_and_single():
    assert tuple(k_reciprocal_encoding(torch.zeros(0, 3)).shape) == (0, 0)
    with pytest.warns(UserWarning, match="k1=30, k2=6 is more than the 1 rows"):
        single = k_reciprocal_encoding(torch.ones(1, 3))
    assert single.to_dense().tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k1": 0, "k2": 1}, ValueError, "k1 must be at least 1, got 0"),
        ({"knn": torch.zeros(6, 4)}, TypeError, r"knn must be a pair \(sq_dist, index\), got Tensor"),
        ({"knn": (torch.zeros(5, 4), torch.zeros(5, 4).long())}, ValueError, "one entry for each row of x"),
        ({"knn": (torch.zeros(6, 2), torch.zeros(6, 2).long())}, ValueError, "at least k1=4 columns"),
        ({"knn": (torch.zeros(6, 4), torch.full((6, 4), -1))}, ValueError, r"index must lie in \[0, 6\), got -1"),
        ({"knn": (torch.zeros(6, 4), torch.zeros(6, 4))}, TypeError, "index must hold integers"),
    ],
)
def test_rejects(options, error, message):
    with pytest.raises(error, match=message):
        k_reciprocal_encoding(torch.eye(6), **{"k1": 4, "k2": 2, **options})


def test_rows_beyond_int32_are_refused():
    from fastreid_u.ops.k_reciprocal import neighbour_counts

    assert neighbour_counts("op", 30, 6, 2**31 - 1) == (30, 6)  # 6e10 pairs: counted in int64
    with pytest.raises(ValueError, match=r"op: x must have fewer than 2\*\*31 rows, got 2147483648"):
        neighbour_counts("op", 30, 6, 2**31)


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 1), (25, 8), (100, 6)])
@pytest.mark.parametrize("n", [1, 2, 65, 1000, 5000])
def test_gpu_gives_what_a_cpu_gives(clustered, n, k1, k2, compat):
    k1, k2 = min(k1, n), min(k2, n)
    x = clustered(n, 64, number=n) * torch.linspace(0.8, 1.2, n)[:, None]
    near = knn(x, k1)
    found = k_reciprocal_encoding(
        x.cuda(), k1, k2, knn=(near[0].cuda(), near[1].cuda()), compat=compat, backend="triton"
    ).cpu()
    expected = k_reciprocal_encoding(x, k1, k2, knn=near, compat=compat)
    assert torch.equal(found.crow_indices(), expected.crow_indices())
    assert torch.equal(found.col_indices(), expected.col_indices())
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-6, rtol=0)

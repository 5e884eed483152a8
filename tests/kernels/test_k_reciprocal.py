# SPDX-License-Identifier: Apache-2.0
"""The Triton k-reciprocal encoding: on a GPU if there is one, else interpreted, so on few rows.

Everything here is equality: the integers of an encoding have one right value.
"""

import numpy as np
import pytest
import torch

from fastreid_u.cpu import k_reciprocal as cpu_encoding
from fastreid_u.cpu import rows as cpu_rows
from fastreid_u.kernels import k_reciprocal
from fastreid_u.reference import k_reciprocal as reference_encoding
from fastreid_u.reference.knn import knn as reference_knn

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encoded(x, index, k1, k2, **options):
    crow, col, mass, total = k_reciprocal.k_reciprocal(x.to(DEVICE), index.to(DEVICE), k1, k2, **options)
    return crow.cpu(), col.cpu(), mass.cpu(), total


def as_lists(index, k1):
    """Neighbour lists as the CPU floor takes them."""
    return np.ascontiguousarray(index[:, :k1].numpy(), np.int32)


def dense(crow, col, mass):
    """Integer rows as an (N, N) int64 matrix."""
    n = len(crow) - 1
    matrix = torch.zeros(n, n, dtype=torch.int64)
    matrix[torch.arange(n).repeat_interleave(crow.diff()), col.long()] = mass.long()
    return matrix


def assert_same_encoding(x, index, k1, k2, compat=False):
    n = len(x)
    crow, col, mass, total = encoded(x, index, k1, k2, compat=compat)
    assert (crow.dtype, col.dtype, mass.dtype) == (torch.int64, torch.int32, torch.int32)
    k1, k2 = min(k1, n), min(k2, n)
    expected = cpu_encoding.encode(x.numpy(), as_lists(index, k1), k2, compat=compat, fixed=True, threads=1)
    cpu_rows.sort_rows(expected, np.arange(n, dtype=np.int32), 1)
    assert total == k2 << cpu_rows.bits(k2)
    for name, found, array in zip(("crow", "col", "mass"), (crow, col, mass), expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), array, err_msg=name)
    truth = reference_encoding.k_reciprocal_encoding(x.double(), k1, k2, knn=(None, index), compat=compat).to_dense()
    torch.testing.assert_close(dense(crow, col, mass).double() / total, truth, atol=2**-22, rtol=0)


@pytest.mark.parametrize(
    ("n", "k1", "k2"), [(1, 1, 1), (2, 30, 6), (13, 13, 5), (37, 10, 3), (41, 9, 1), (33, 20, 6), (30, 25, 2)]
)
def test_encoding_matches_cpu_and_reference(clustered, n, k1, k2):
    x = clustered(n, 9, number=n)
    assert_same_encoding(x, reference_knn(x, k1)[1], k1, k2)


def test_encoding_of_rows_not_of_unit_length(clustered):
    x = clustered(29, 40) * torch.linspace(0.5, 3, 29)[:, None]
    index = reference_knn(x, 12)[1]
    assert_same_encoding(x, index, 8, 2)  # lists longer than k1
    assert_same_encoding(x, index.int(), 8, 2, compat=True)


def test_far_members_weigh_nothing_and_are_dropped(clustered):
    x = clustered(24, 6) * 1e3
    index = reference_knn(x, 8)[1]
    assert_same_encoding(x, index, 8, 2)
    crow, _, mass, total = encoded(x, index, 8, 1)
    assert (mass > 0).all()
    assert torch.equal(dense(crow, encoded(x, index, 8, 1)[1], mass).sum(1), torch.full((24,), total))


def test_encoding_in_blocks(clustered, monkeypatch):
    x = clustered(34, 10)
    index = reference_knn(x, 8)[1]
    whole = encoded(x, index, 8, 3)
    monkeypatch.setattr(k_reciprocal, "_SLOTS", 100)
    for found, expected in zip(encoded(x, index, 8, 3), whole, strict=True):
        assert found == expected if isinstance(found, int) else torch.equal(found, expected)


def test_two_thirds_exactly_is_not_enough():
    # with k1 = 3 the half list has 3 entries. H(1) = {0, 1, 3}: of these 0 and 1 are in R(0) = {0, 1}
    index = torch.tensor([[0, 1, 2], [1, 0, 3], [2, 4, 5], [3, 1, 4], [4, 2, 3], [5, 2, 4]])
    assert dense(*encoded(torch.zeros(6, 2), index, 3, 1)[:3])[0].nonzero().flatten().tolist() == [0, 1]
    assert_same_encoding(torch.zeros(6, 2), index, 3, 1)


def test_row_missing_from_its_own_list_is_empty():
    index = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    crow, col, mass, total = encoded(torch.zeros(4, 2), index, 2, 1)
    assert crow.tolist() == [0, 2, 4, 4, 4]
    assert col.tolist() == [0, 1, 0, 1]
    assert (mass == total // 2).all()


def test_encoding_empty_and_rejects():
    crow, col, mass, _ = encoded(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), 3, 2)
    assert (crow.tolist(), len(col), len(mass)) == ([0], 0, 0)
    with pytest.raises(TypeError, match=r"x float32 and index int32 or int64, got torch\.float64"):
        encoded(torch.zeros(4, 3).double(), torch.zeros(4, 3, dtype=torch.int64), 3, 2)
    with pytest.raises(ValueError, match=r"index must be \(N, >= 4\), got \(4, 3\) for N=4"):
        encoded(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64), 5, 2)


@pytest.mark.parametrize(("n", "k1", "k2"), [(1, 1, 1), (37, 10, 3), (33, 20, 6)])
def test_float32_encoding_is_the_published_arithmetic(clustered, n, k1, k2):
    """The CPU's to the last bits of an exponential; integers are further off."""
    x = clustered(n, 9, number=n) * torch.linspace(0.7, 1.3, n)[:, None]
    index = reference_knn(x, k1)[1]
    crow, col, mass, total = encoded(x, index, k1, k2, compat=True, fixed=False)
    expected = cpu_encoding.k_reciprocal_encoding(x.numpy(), as_lists(index, k1), k2, compat=True)
    assert (mass.dtype, total) == (torch.float32, 1)
    np.testing.assert_array_equal(crow.numpy(), expected.indptr)
    np.testing.assert_array_equal(col.numpy(), expected.column)
    np.testing.assert_allclose(mass.numpy(), expected.mass, rtol=4e-7, atol=0)


def test_float32_sums_run_in_rank_order():
    """1 + 2^-24 + 2^-24 is 1 in float32, unless the small ones come first."""
    small = 2.0**-24
    crow, col = torch.tensor([0, 2, 3, 4, 5]), torch.tensor([0, 3, 0, 0, 1], dtype=torch.int32)
    mass = torch.tensor([1, 0.5, small, small, 1])
    lists = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 3, 0], [3, 3, 3]])
    _, column, mean = k_reciprocal._average_rows(crow, col, mass, lists[:3].repeat(2, 1)[:4])
    third = torch.tensor(3.0)
    assert column.tolist() == [0, 3, 0, 3, 0, 1, 3, 0, 3]
    assert mean[0] == torch.tensor(1.0) / third
    assert mean[2] == torch.tensor(1 + 2 * small) / third


@pytest.mark.parametrize("k2", [1, 2, 6, 7, 8, 100, 127, 128, 1000])
def test_full_rows_stay_below_int32(k2):
    bits = k_reciprocal.bits(k2)
    assert bits == cpu_rows.bits(k2)
    assert 20 < bits <= 28
    assert k2 << bits < 2**31


@pytest.mark.gpu
def test_means_are_divided_as_on_a_cpu():
    """torch on a GPU divides by a number by multiplying with its rounded reciprocal; the published mean is divided."""
    generator = torch.Generator().manual_seed(0)
    crow, col = torch.arange(0, 4001, 4), torch.arange(4).repeat(1000).int()
    mass, lists = torch.rand(4000, generator=generator), torch.randint(1000, (1000, 6), generator=generator)
    parts = crow, col, mass, lists
    expected = k_reciprocal._average_rows(*parts)
    for found, part in zip(k_reciprocal._average_rows(*(part.cuda() for part in parts)), expected, strict=True):
        assert torch.equal(found.cpu(), part)

# SPDX-License-Identifier: Apache-2.0
"""knn: exact distances, exact order, whatever the ties."""

import numpy as np
import pytest
import torch

from fastreid_u.ops.knn import knn
from fastreid_u.reference import knn as reference


def brute_force(x, k, gallery=None):
    """Sort everything by (is not the row itself, float32 distance, index)."""
    y = x if gallery is None else gallery
    sq_dist = ((x.double()[:, None] - y.double()[None]) ** 2).sum(-1).float().numpy()
    own = np.eye(len(x), dtype=bool) if gallery is None else np.zeros(sq_dist.shape, bool)
    order = np.stack([np.lexsort((np.arange(len(y)), row, ~mine)) for row, mine in zip(sq_dist, own, strict=True)])
    index = order[:, :k]
    return np.take_along_axis(sq_dist, index, 1), index


def assert_same(found, expected):
    np.testing.assert_array_equal(found[1].numpy(), expected[1])
    np.testing.assert_array_equal(found[0].numpy(), expected[0])


@pytest.mark.parametrize("name", ["jaccard_n64_d32", "jaccard_n257_d128", "jaccard_n600_d256"])
def test_golden_neighbour_sets(golden, device, name):
    file = golden(name)
    index = knn(file.tensor("features").to(device), 30)[1].cpu()
    for cut in (30, 20, 16, 11, 10, 6, 3):
        found, expected = index[:, :cut].sort(1).values, file.tensor("rank31")[:, :cut].sort(1).values
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 1, 2), (7, 5, 3), (33, 17, 33), (97, 64, 8), (131, 2, 30)])
def test_matches_brute_force(n, d, k):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    assert_same(knn(x, k), brute_force(x, k))


@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (5, 40, 7), (40, 5, 5), (13, 29, 29)])
def test_gallery(n, m, k):
    generator = torch.Generator().manual_seed(m)
    x, gallery = torch.randn(n, 6, generator=generator), torch.randn(m, 6, generator=generator)
    gallery[0] = x[0]
    assert_same(knn(x, k, gallery=gallery), brute_force(x, k, gallery))


@pytest.mark.parametrize("k", [1, 4, 9, 30])
def test_ties_on_a_grid_go_to_the_lower_index(k):
    x = torch.cartesian_prod(*[torch.arange(4.0)] * 3)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    assert_same(knn(x, k), brute_force(x, k))


def test_more_copies_than_k():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2)).repeat(12, 1)
    sq_dist, index = knn(x, 4)
    assert_same((sq_dist, index), brute_force(x, 4))
    assert torch.equal(index[:, 0], torch.arange(60)), "a row's own index comes first"
    assert (sq_dist == 0).all()
    assert index[57].tolist() == [57, 2, 7, 12]


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_common_offset_does_not_cancel(offset):
    x = torch.randn(80, 40, generator=torch.Generator().manual_seed(3)) * 1e-2 + offset
    assert_same(knn(x, 12), brute_force(x, 12))


def test_rows_of_very_different_length():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(4)) * torch.logspace(-6, 6, 60)[:, None]
    assert_same(knn(x, 10), brute_force(x, 10))


def test_zero_rows_are_points_like_any_other():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(5))
    x[[3, 7, 19]] = 0
    sq_dist, index = knn(x, 4)
    assert index[7, :3].tolist() == [7, 3, 19]
    assert sq_dist[7, :3].tolist() == [0, 0, 0]
    assert torch.isfinite(sq_dist).all()


def test_block_size_does_not_matter(clustered, monkeypatch):
    x = clustered(150, 24)
    expected = knn(x, 20)
    monkeypatch.setattr(reference, "_BLOCK_ENTRIES", 700)
    for found, whole in zip(knn(x, 20, backend="reference"), expected, strict=True):
        assert torch.equal(found, whole)


def test_distances_equal_both_ways(clustered):
    x = clustered(90, 33)
    sq_dist, index = knn(x, 90)
    full = torch.empty(90, 90).scatter_(1, index, sq_dist)
    assert torch.equal(full, full.T)


def test_float64_reference_keeps_float64(clustered):
    x = clustered(50, 12, dtype=torch.float64)
    sq_dist, index = reference.knn(x, 7)
    assert sq_dist.dtype == torch.float64
    truth = (x[:, None] - x[index]).square().sum(-1)
    torch.testing.assert_close(sq_dist, truth, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_taken_in_float32(clustered, dtype):
    x = clustered(40, 16).to(dtype)
    sq_dist, index = knn(x, 5)
    assert (sq_dist.dtype, index.dtype) == (torch.float32, torch.int64)
    assert_same((sq_dist, index), brute_force(x.float(), 5))


class OnlyDLPack:
    """An array of another library: nothing but the protocol."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_arrays_of_other_libraries_and_strides(clustered):
    x = clustered(60, 10)
    expected = knn(x, 6)
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    wide = torch.empty(60, 20)
    wide[:, ::2] = x
    for other in (x.numpy(), read_only, x.numpy()[::-1][::-1], OnlyDLPack(x), wide[:, ::2], x.T.contiguous().T):
        for found, wanted in zip(knn(other, 6), expected, strict=True):
            assert torch.equal(found, wanted)


def test_does_not_track_gradients(clustered):
    sq_dist, _ = knn(clustered(12, 4).requires_grad_(), 3)
    assert not sq_dist.requires_grad


def test_empty():
    sq_dist, index = knn(torch.zeros(0, 5), 3)
    assert (sq_dist.shape[0], index.shape[0], index.dtype) == (0, 0, torch.int64)


def test_k_beyond_n_is_clipped_with_one_warning():
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="knn: k=9 is more than the data have, using 4") as caught:
        sq_dist, _ = knn(x, 9)
    assert sq_dist.shape == (4, 4)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(3), 1), {}, r"knn: x must be 2-D, got shape \(3,\)"),
        ((torch.zeros(3, 2), 0), {}, "knn: k must be at least 1, got 0"),
        ((torch.zeros(3, 2), 1), {"gallery": torch.zeros(3, 4)}, "knn: gallery must have 2 columns like x, got 4"),
        ((torch.zeros(3, 2), 1), {"backend": "cuda12"}, "knn: backend must be one of 'auto', .*got 'cuda12'"),
    ],
)
def test_rejects_values(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        knn(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2, dtype=torch.int64), 1), "knn: x must be floating point, got torch.int64"),
        ((torch.zeros(3, 2), 1.5), "knn: k must be an integer, got 1.5"),
        (("features", 1), "knn: x must be a tensor or an array with __dlpack__, got str"),
    ],
)
def test_rejects_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        knn(*arguments)


def test_nan_is_counted_and_located():
    x = torch.zeros(10, 4)
    x[[4, 6, 9], 1] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with pytest.raises(
        ValueError, match=r"knn: x must be finite, got NaN or infinity in 3 of 10 rows \(first: row 4\)"
    ):
        knn(x, 2)


def test_takes_no_precision():
    """It chose nothing: every backend finds its candidates in its own precision, and measures them exactly."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'precision'"):
        knn(torch.zeros(3, 2), 1, precision="fp8")


def test_precision_set_by_its_newer_name():
    """``torch.get_float32_matmul_precision`` raises once the newer setting differs from the older."""
    x = torch.randn(40, 8)
    wanted = knn(x, 3)
    old = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = knn(x, 3, approximate=np.False_)
    finally:
        torch.backends.cuda.matmul.fp32_precision = old
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_without_columns(backend):
    sq_dist, index = knn(torch.zeros(4, 0), 2, backend=backend)
    assert sq_dist.count_nonzero() == 0
    assert index[:, 0].tolist() == [0, 1, 2, 3]


# on a GPU, against what a CPU gives


# one row, powers of two and their neighbours, sizes past a buffer, a tile of products and a block of queries
SIZES = [1, 2, 63, 64, 65, 511, 513, 1000, 2049, 8191, 8193, 12_936]


def assert_same_as_a_cpu(x, k, gallery=None):
    found = knn(x.cuda(), k, gallery=None if gallery is None else gallery.cuda(), backend="triton")
    expected = knn(x, k, gallery=gallery)
    assert found[0].is_cuda
    differ = (found[1].cpu() != expected[1]).nonzero()
    assert len(differ) == 0, f"{len(differ)} entries differ, first at {differ[0].tolist()}"
    # both round one float64 sum; sums in another order may fall on the other side of a float32 once in a while
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=0, rtol=1.2e-7)


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("d", "k"), [(64, 30), (200, 5)])
def test_gpu(clustered, n, d, k):
    assert_same_as_a_cpu(clustered(n, d, number=n), min(k, n))


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(("n", "m", "d", "k"), [(100, 9000, 128, 10), (9000, 100, 33, 100), (3000, 20_000, 2048, 20)])
def test_gpu_in_a_gallery(clustered, n, m, d, k):
    assert_same_as_a_cpu(clustered(n, d), k, clustered(m, d, number=1))


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("case", ["sorted", "copies", "all copies", "common mean", "rows of all sizes"])
def test_gpu_of_hard_data(clustered, case):
    x = clustered(3000, 48)
    if case == "sorted":
        x = x[(x @ x[0]).argsort()]
    elif case == "copies":
        x[500:900] = x[3]
    elif case == "all copies":
        x = x[:1].repeat(2000, 1)
    elif case == "common mean":
        x = x * 1e-3 + 1
    else:
        x = x * 10 ** torch.linspace(-3, 3, 3000)[:, None]
    assert_same_as_a_cpu(x, 30)

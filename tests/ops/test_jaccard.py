# SPDX-License-Identifier: Apache-2.0
"""Jaccard distance: published numbers, the formula, and the promises of the sparse form."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_distance, jaccard_graph
from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
from fastreid_u.ops.knn import knn
from fastreid_u.reference import jaccard as reference
from fastreid_u.reference import k_reciprocal as reference_encoding

TOLERANCE = 2e-6  # recommended with the golden files: float32 sums of about 100 terms in another order
PAIRS = [(30, 6), (20, 6), (30, 1), (10, 3)]


def given(rank):
    """Stored neighbour lists as the ``knn`` argument; the distances beside them are not read."""
    return torch.zeros(rank.shape), rank


def assert_near(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(found.numpy() < 1, expected < 1)


@pytest.mark.parametrize(("k1", "k2"), PAIRS)
@pytest.mark.parametrize("name", ["jaccard_n64_d32", "jaccard_n257_d128", "jaccard_n600_d256"])
def test_golden(golden, device, name, k1, k2):
    file = golden(name)
    found = jaccard_distance(file.tensor("features").to(device), k1, k2).cpu()
    assert_near(found, file.matrix(f"dist_k{k1}_{k2}"))


@pytest.mark.parametrize(("k1", "k2"), [(25, 6), (15, 4), (9, 1), (5, 2)])
def test_golden_odd_k1(golden, k1, k2):
    file = golden("jaccard_edge_odd_k1")
    assert_near(jaccard_distance(file.tensor("features"), k1, k2), file[f"dist_k{k1}_{k2}"])


def test_golden_rows_not_of_unit_length(golden):
    file = golden("jaccard_edge_unnormalised")
    x = file.tensor("features")
    assert_near(jaccard_distance(x), file["dist_fastreid_k30_6"])
    assert_near(jaccard_distance(x, compat=True), file["dist_clustercontrast_k30_6"])


def test_golden_half_precision_inside_is_another_distance(golden):
    """Published code can keep V in float16; nothing turns it on, and it costs three digits."""
    file = golden("jaccard_edge_float16")
    found = jaccard_distance(file.tensor("features"))
    assert_near(found, file["dist_fp32_k30_6"])
    gap = np.abs(found.numpy() - file["dist_fp16_k30_6"].astype(np.float32)).max()
    assert 0.001 < gap < 0.006


@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 6)])
def test_golden_distances_of_one_name(golden, k1, k2):
    """Ours is that of the faiss versions; the torch versions of CAP and ICE are another, up to 0.17 away."""
    file = golden("jaccard_variants_n180")
    found = jaccard_distance(file.tensor("features"), k1, k2)
    assert_near(found, file.matrix(f"dist_clustercontrast_k{k1}_{k2}"))
    assert np.abs(found.numpy() - file.matrix(f"dist_cap_torch_k{k1}_{k2}")).max() > 0.1
    labels = file.tensor(f"labels_fastreid_k{k1}_{k2}_eps0.60")
    assert torch.equal(dbscan(found, 0.6), labels)
    assert not torch.equal(labels, file.tensor(f"labels_ice_torch_k{k1}_{k2}_eps0.60"))


@pytest.mark.parametrize("n", [5, 20])
def test_golden_fewer_points_than_k1(golden, n):
    file = golden("jaccard_edge_fewer_than_k1")
    with pytest.warns(UserWarning, match=f"more than the {n} rows") as caught:
        found = jaccard_distance(file.tensor(f"features_n{n}"))
    assert len(caught) == 1
    assert_near(found, file[f"dist_k1_clipped_n{n}"])


@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (10, 3), (10, 1)])
def test_golden_copies_from_stored_lists(golden, k1, k2):
    file = golden("jaccard_edge_duplicates")
    rank = file.tensor(f"rank_k{k1}_{k2}")
    assert_near(jaccard_distance(file.tensor("features"), k1, k2, knn=given(rank)), file[f"dist_k{k1}_{k2}"])


@pytest.mark.parametrize("name", ["jaccard_edge_tight", "jaccard_edge_tight_noise_level"])
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 6)])
def test_golden_one_tight_cluster_from_stored_lists(golden, name, k1, k2):
    file = golden(name)
    rank = file.tensor(f"rank_k{k1}_{k2}")
    assert_near(jaccard_distance(file.tensor("features"), k1, k2, knn=given(rank)), file[f"dist_k{k1}_{k2}"])


@pytest.mark.parametrize("n", [2, 13, 61, 128, 129])
def test_equals_the_formula_in_float64(clustered, n):
    x = clustered(n, 10, number=n, dtype=torch.float64)
    k1, k2 = min(12, n), min(4, n)
    v = reference_encoding.k_reciprocal_encoding(x, k1, k2).to_dense()
    least = torch.minimum(v[:, None], v[None]).sum(-1)
    most = torch.maximum(v[:, None], v[None]).sum(-1)
    exact = reference.jaccard_distance(x, k1, k2)
    torch.testing.assert_close(exact, 1 - least / most, atol=1e-12, rtol=0)
    torch.testing.assert_close(jaccard_distance(x, k1, k2).double(), exact, atol=TOLERANCE, rtol=0)


def test_float32_sums_run_over_ascending_columns(clustered):
    """The reference, bitwise the published accumulation, given the same encoding."""
    x = clustered(90, 8)
    v = k_reciprocal_encoding(x, 15, 4, backend="reference").to_dense().numpy()
    found = jaccard_distance(x, 15, 4, backend="reference").numpy()
    for i in range(0, 90, 7):
        mass = np.zeros(90, np.float32)
        for column in v[i].nonzero()[0]:
            mass += np.minimum(v[i, column], v[:, column])
        np.testing.assert_array_equal(found[i], np.maximum(1 - mass / (2 - mass), 0))


def test_symmetric_bounded_small_diagonal(clustered):
    distance = jaccard_distance(clustered(211, 20))
    assert torch.equal(distance, distance.T)
    assert distance.min() >= 0
    assert distance.max() == 1
    assert distance.diagonal().max() < TOLERANCE


def test_renaming_the_points_changes_nothing(clustered):
    x = clustered(150, 16, dtype=torch.float64)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    moved = reference.jaccard_distance(x[order], 20, 6)
    torch.testing.assert_close(moved, reference.jaccard_distance(x, 20, 6)[order][:, order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_graph_stores_exactly_the_near_pairs(clustered, radius):
    x = clustered(140, 12)
    dense = jaccard_distance(x).numpy()
    graph = jaccard_graph(x, radius=radius)
    assert (graph.layout, graph.dtype, tuple(graph.shape)) == (torch.sparse_csr, torch.float32, (140, 140))
    row, column = ((dense <= np.float32(radius)) & (dense < 1)).nonzero()
    np.testing.assert_array_equal(graph.crow_indices().diff().numpy(), np.bincount(row, minlength=140))
    np.testing.assert_array_equal(graph.col_indices().numpy(), column)
    np.testing.assert_array_equal(graph.values().numpy(), dense[row, column])


def test_radius_is_inclusive_in_float32(clustered):
    x = clustered(60, 8)
    value = jaccard_graph(x).values()
    between = value[(value > 0.2) & (value < 0.8)][0]
    at = jaccard_graph(x, radius=float(between))
    below = jaccard_graph(x, radius=float(np.nextafter(between.numpy(), np.float32(0))))
    assert (at.values() == between).any()
    assert not (below.values() == between).any()


def test_copies_are_explicit_zeros_or_rounding():
    x = torch.eye(3).repeat_interleave(8, 0)
    graph = jaccard_graph(x, k1=8, k2=1)
    assert graph.values().numel() == 3 * 64
    assert graph.values().max() < TOLERANCE
    assert (graph.values() == 0).any()


def test_given_lists_may_be_longer(clustered):
    x = clustered(100, 10)
    wide = jaccard_graph(x, k1=10, k2=3, knn=knn(x, 40))
    assert torch.equal(wide.to_dense(), jaccard_graph(x, k1=10, k2=3).to_dense())


def test_empty_and_single():
    graph = jaccard_graph(torch.zeros(0, 4))
    assert (tuple(graph.shape), graph.values().numel()) == ((0, 0), 0)
    assert tuple(jaccard_distance(torch.zeros(0, 4)).shape) == (0, 0)
    with pytest.warns(UserWarning, match="more than the 1 rows"):
        assert jaccard_distance(torch.ones(1, 4)).tolist() == [[0.0]]


def test_zero_rows_are_near_each_other_only(clustered):
    x = clustered(60, 10)
    zeros = [5, 20, 40]
    x[zeros] = 0
    distance = jaccard_distance(x, 10, 1)
    assert torch.isfinite(distance).all()
    assert distance[zeros][:, zeros].max() < 0.5
    rest = torch.ones(60, dtype=torch.bool)
    rest[zeros] = False
    assert distance[zeros][:, rest].min() > 0.5


def test_numpy_in_torch_out(clustered):
    x = clustered(50, 6)
    assert torch.equal(jaccard_distance(x.numpy()), jaccard_distance(x))


def test_no_warning_of_torch_reaches_the_user():
    script = (
        "import torch; from fastreid_u.ops.jaccard import jaccard_graph; jaccard_graph(torch.randn(40, 8)).to_dense()"
    )
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "beta" not in run.stderr
    assert "invariant" not in run.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 1.5}, r"jaccard_graph: radius must lie in \[0, 1\], got 1.5"),
        ({"radius": float("nan")}, r"jaccard_graph: radius must lie in \[0, 1\], got nan"),
        ({"k1": 3, "k2": 0}, r"jaccard_graph: k2 must be at least 1, got 0"),
        ({"backend": "triton9"}, "jaccard_graph: backend must be one of 'auto'"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        jaccard_graph(torch.eye(40), **options)


def test_rejects_nan():
    x = torch.eye(40)
    x[17, 3] = torch.nan
    with pytest.raises(ValueError, match=r"jaccard_distance: x must be finite, .* 1 of 40 rows \(first: row 17\)"):
        jaccard_distance(x)


# on a GPU, against what a CPU gives


# one row, powers of two and their neighbours, sizes past a buffer, a tile of products and a block of queries
SIZES = [1, 2, 63, 64, 65, 511, 513, 1000, 2049, 8191, 8193, 12_936]


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("radius", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_gpu_graph(clustered, n, radius):
    """Bit for bit the CPU's: both add the same integers, unless a float64 softmax was rounded another way."""
    k1, k2 = min(30, n), min(6, n)
    x = clustered(n, 64, number=n)
    near = knn(x, k1)
    found = jaccard_graph(
        x.cuda(), k1=k1, k2=k2, radius=radius, knn=(near[0].cuda(), near[1].cuda()), backend="triton"
    ).cpu()
    expected = jaccard_graph(x, k1=k1, k2=k2, radius=radius, knn=near, backend="numba")
    assert torch.equal(found.crow_indices(), expected.crow_indices())
    assert torch.equal(found.col_indices(), expected.col_indices())
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-7, rtol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
def test_gpu_graph_is_bitwise_symmetric_and_repeatable(clustered):
    x = clustered(4000, 32, spread=1.2).cuda()
    graphs = [jaccard_graph(x, radius=0.9, backend="triton") for _ in range(3)]
    assert all(torch.equal(graph.values(), graphs[0].values()) for graph in graphs)
    row = torch.arange(4000, device="cuda").repeat_interleave(graphs[0].crow_indices().diff())
    order = (graphs[0].col_indices() * 4000 + row).argsort()
    assert torch.equal(graphs[0].values()[order], graphs[0].values())


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("case", ["all copies", "hub"])
def test_gpu_graph_of_collapsed_data(clustered, case):
    x = clustered(1500, 32)
    x = x[:1].repeat(1500, 1) if case == "all copies" else torch.nn.functional.normalize(x + 3)
    found = jaccard_graph(x.cuda(), radius=0.6, backend="triton").cpu()
    expected = jaccard_graph(x, radius=0.6, backend="numba")
    assert torch.equal(found.col_indices(), expected.col_indices())
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-7, rtol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("n", [20_000, 40_000])
def test_no_square_of_the_rows(clustered, n):
    """Peak memory stays far below N x N, and below a stated number of bytes a row."""
    x = clustered(n, 64).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    jaccard_graph(x, radius=0.6, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 500e6 + 20_000 * n


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
def test_triton_on_another_stream(clustered):
    """Features written there just before are seen, and nothing is handed back before it is read."""
    x = clustered(3000, 32)
    expected = jaccard_graph(x, radius=0.6)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(3000, 32, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = jaccard_graph(late, radius=0.6, backend="triton")
    stream.synchronize()
    assert torch.equal(found.crow_indices().cpu(), expected.crow_indices())
    assert torch.equal(found.col_indices().cpu(), expected.col_indices())


@pytest.mark.gpu
@pytest.mark.usefixtures("all_cores")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_triton_on_a_device_that_is_not_the_current_one(clustered):
    x = clustered(1000, 32)
    expected = jaccard_graph(x, radius=0.6)
    with torch.cuda.device(0):
        found = jaccard_graph(x.to("cuda:1"), radius=0.6, backend="triton")
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.col_indices().cpu(), expected.col_indices())

# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the pseudo-label step: on a GPU if there is one, else interpreted, so on few rows.

Everything here is equality: indices, integer encodings, overlaps and the distances made of them have one right answer.
"""

import numpy as np
import pytest
import torch

from fastreid_u.cpu import jaccard as cpu_jaccard
from fastreid_u.cpu import k_reciprocal as cpu_encoding
from fastreid_u.cpu import rows as cpu_rows
from fastreid_u.kernels import jaccard, k_reciprocal, knn
from fastreid_u.reference import k_reciprocal as reference_encoding
from fastreid_u.reference.knn import knn as reference_knn

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 2e-6  # recommended with the golden files


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


def search(x, k, gallery=None):
    sq_dist, index = knn.knn(x.to(DEVICE), k, None if gallery is None else gallery.to(DEVICE))
    return sq_dist.cpu(), index.cpu()


# knn


def assert_same_neighbours(x, k, gallery=None):
    sq_dist, index = search(x, k, gallery)
    expected = reference_knn(x, k, gallery=gallery)
    assert (sq_dist.dtype, index.dtype) == (torch.float32, torch.int64)
    assert torch.equal(index, expected[1])
    # both round one float64 sum; sums in another order may fall on the other side of a float32 once in a while
    torch.testing.assert_close(sq_dist, expected[0], atol=0, rtol=1.2e-7)


@pytest.fixture
def exhaustive(monkeypatch):
    """Rows that had to be measured against everything, as they come."""
    rows, against_all = [], knn._against_all
    monkeypatch.setattr(knn, "_against_all", lambda *args: (rows.extend(args[2].tolist()), against_all(*args))[1])
    return rows


@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 1, 5), (7, 9, 7), (45, 33, 6), (53, 260, 20), (70, 16, 1)])
def test_knn_matches_reference(clustered, exhaustive, n, d, k):
    assert_same_neighbours(clustered(n, d, number=n), k)
    assert exhaustive == []


@pytest.mark.parametrize(("n", "m", "k"), [(1, 40, 5), (30, 1, 3), (17, 41, 41), (9, 70, 2)])
def test_knn_in_a_gallery(clustered, n, m, k):
    assert_same_neighbours(clustered(n, 20, number=n), k, clustered(m, 20, number=m) * 1.5)


def test_knn_in_rounds(clustered, exhaustive):
    """A gallery longer than the buffer, sorted by identity: thresholds rise and no buffer overflows."""
    x = clustered(60, 12)
    x = torch.cat([x, x + 0.01, x + 0.03, x - 0.01]).reshape(4, 60, 12).transpose(0, 1).reshape(240, 12)
    assert len(list(knn._Search(x, x, 2)._rounds(240))) > 1
    queries = x[::9].contiguous()
    assert_same_neighbours(queries, 2, x)
    assert exhaustive == []


def test_knn_copies_tie_by_index(clustered, exhaustive):
    x = clustered(40, 8)
    x[9:30] = x[5]
    assert_same_neighbours(x, 6)
    sq_dist, index = search(x, 6)
    assert index[20].tolist() == [20, 5, 9, 10, 11, 12]
    assert sq_dist[20].tolist() == [0] * 6
    assert exhaustive == []


def test_knn_more_copies_than_the_buffer_holds(exhaustive):
    x = torch.ones(70, 4)
    x[3:5] *= 2
    assert_same_neighbours(x[:6].contiguous(), 2, x)
    assert exhaustive == [0, 1, 2, 5]


def test_knn_where_float16_sees_nothing(clustered, exhaustive):
    """One far row takes the range, the rest lie closer together than float16 resolves: still right."""
    x = torch.cat([clustered(70, 6) * 1e-6, torch.full((1, 6), 1e3)])
    queries = torch.arange(0, 71, 10)
    assert_same_neighbours(x[queries], 2, x)
    assert exhaustive


@pytest.mark.parametrize("shift", [0.0, 5.0, 300.0])
def test_knn_with_a_common_mean(clustered, shift):
    x = clustered(45, 24) * 0.01 + shift
    assert_same_neighbours(x, 4)


@pytest.mark.parametrize("case", ["unit", "rows of all sizes", "common mean", "tiny", "huge"])
def test_knn_bounds_hold(clustered, case):
    x = clustered(80, 40, dtype=torch.float64)
    x = {
        "unit": x,
        "rows of all sizes": x * 10 ** torch.linspace(-4, 3, 80)[:, None],
        "common mean": x * 1e-3 + 7,
        "tiny": x * 1e-30,
        "huge": x * 1e15,
    }[case].float()
    find = knn._Search(x, x, 2)
    half, length = find._centred(x[find.order])
    score = half.half().double() @ find.gallery.double().T
    reach = (length + find.tiny)[:, None]
    slack = reach * find.slack.double() + find.curve * find.slack.double() ** 2
    exact = (x.double() - find.mean.double()) * find.scale
    exact = exact[find.order] @ exact[find.order].T - exact[find.order].square().sum(1) / 2
    found = score + find.lift.double() - find.curve * find.slack.double() ** 2
    assert ((found - exact).abs() <= slack).all()
    coarse = half.bfloat16().double() @ find.gallery.bfloat16().double().T
    assert not ((coarse + found - score - exact).abs() <= slack).all(), "the bound would pass bfloat16 as float16"


@pytest.mark.parametrize("m", [1, 2, 3, 4, 10, 97, 100, 4096, 12936])
def test_knn_visits_every_row_once(m):
    order = torch.arange(m) * knn._golden_stride(m) % m
    assert torch.equal(order.sort().values, torch.arange(m))
    if m > 90:  # any tenth of the visit is spread over the whole
        assert order[: m // 10].sort().values.diff().max() < 20 * 1.62


def test_knn_empty_and_rejects():
    assert [tuple(part.shape) for part in knn.knn(torch.zeros(0, 3), 2)] == [(0, 0), (0, 0)]
    assert tuple(knn.knn(torch.zeros(4, 3), 2, torch.zeros(0, 3))[1].shape) == (4, 0)
    with pytest.raises(TypeError, match=r"x and gallery float32, got torch\.float64"):
        knn.knn(torch.zeros(4, 3).double(), 2)
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(M, D\) with D > 0, got \(4, 3\) and \(4, 2\)"):
        knn.knn(torch.zeros(4, 3), 2, torch.zeros(4, 2))


# k-reciprocal encoding


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


# Jaccard


def assert_same_graph(crow, col, mass, weight, radius):
    """Against sums of minima over dense rows, in integers."""
    n = len(crow) - 1
    matrix = dense(crow, col, mass)
    overlap = torch.stack([torch.minimum(row, matrix).sum(1) for row in matrix]) if n else matrix
    distance = (2 * (weight - overlap.double()) / (2 * weight - overlap.double())).float()
    near = (distance <= torch.tensor(radius, dtype=torch.float32)) & (distance < 1)
    parts = (part.to(DEVICE) for part in (crow, col, mass))
    found = [part.cpu() for part in jaccard.jaccard(*parts, weight, radius)]
    assert [part.dtype for part in found] == [torch.int64, torch.int64, torch.float32]
    assert torch.equal(found[0].diff(), near.sum(1))
    assert torch.equal(found[1], near.nonzero()[:, 1])
    assert torch.equal(found[2], distance[near])
    return found


@pytest.mark.parametrize(("n", "k1", "k2"), [(2, 2, 2), (31, 10, 3), (45, 8, 1)])
def test_graph_of_encodings(clustered, n, k1, k2):
    x = clustered(n, 8, number=n)
    index = reference_knn(x, k1)[1]
    rows = encoded(x, index, k1, k2)
    for radius in (0.0, 0.2, 0.6, 1.0):
        found = assert_same_graph(*rows, radius)
        for part, array in zip(
            found, cpu_jaccard.jaccard_graph(x.numpy(), as_lists(index, k1), k2, radius), strict=True
        ):
            np.testing.assert_array_equal(part.numpy(), array)


def random_rows(n, columns, entries, number=0):
    """Rows of up to ``entries`` random columns, of total 900 to 1000; every fifth is empty."""
    generator = torch.Generator().manual_seed(number)
    crow, col, mass = [0], [], []
    for i in range(n):
        count = 0 if i % 5 == 4 else int(torch.randint(1, entries + 1, (1,), generator=generator))
        col.append(torch.randperm(columns, generator=generator)[:count].sort().values)
        mass.append(torch.full((count,), 900 // max(count, 1)))
        mass[-1][:1] += int(torch.randint(0, 100, (1,), generator=generator))
        crow.append(crow[-1] + count)
    return torch.tensor(crow), torch.cat(col).int(), torch.cat(mass).int()


@pytest.mark.parametrize("radius", [0.3, 0.97])
def test_hash_tables_smaller_than_the_rows(radius):
    rows = random_rows(230, 200, 3)
    assert_same_graph(*rows, 1000, radius)


def test_tables_in_blocks(monkeypatch):
    rows = random_rows(60, 20, 4)
    monkeypatch.setattr(jaccard, "_SLOTS", 70)
    assert_same_graph(*rows, 1000, 0.5)


@pytest.mark.parametrize("radius", [0.5, 1.0])
def test_one_column_that_every_row_holds(radius):
    n = 40
    crow = torch.arange(n + 1) * 2
    col = torch.stack([torch.zeros(n), torch.arange(n) // 2 + 1], dim=1).flatten().int()
    mass = torch.tensor([600, 400], dtype=torch.int32).repeat(n)
    assert_same_graph(crow, col, mass, 1000, radius)


def test_radius_is_inclusive():
    crow, col = torch.tensor([0, 2, 4, 4]), torch.tensor([0, 1, 0, 2], dtype=torch.int32)
    mass = torch.tensor([2, 1, 2, 1], dtype=torch.int32)  # T = 2 of W = 3: J = 2 (3 - 2) / (2 * 3 - 2)
    assert len(assert_same_graph(crow, col, mass, 3, 0.5)[1]) == 4
    assert len(assert_same_graph(crow, col, mass, 3, 0.5 - 1e-7)[1]) == 2


@pytest.mark.parametrize("weight", [1, 6 << 28, 127 << 24])
@pytest.mark.parametrize("radius", [0.0, 1e-9, 0.5, 0.6, 0.999999, 1.0])
def test_least_overlap_is_the_boundary(weight, radius):
    need = jaccard.least_overlap(radius, weight)
    assert need == cpu_jaccard.least_overlap(radius, weight)
    at, before = jaccard.to_distance(torch.tensor([need, need - 1]), weight).tolist()
    assert at <= np.float32(radius)
    assert at < 1
    assert before > np.float32(radius) or before == 1


def test_graph_empty_and_rejects():
    none = torch.zeros(0, dtype=torch.int32)
    assert jaccard.jaccard(torch.tensor([0]), none, none, 4)[0].tolist() == [0]
    assert jaccard.jaccard(torch.tensor([0, 0, 0]), none, none, 4)[0].tolist() == [0, 0, 0]
    with pytest.raises(TypeError, match=r"crow int64, col and mass int32, got torch\.int64, torch\.int64"):
        jaccard.jaccard(torch.tensor([0]), none.long(), none, 4)
    with pytest.raises(ValueError, match="weight must lie in"):
        jaccard.jaccard(torch.tensor([0]), none, none, 2**31)


# all of them, against published numbers


def pipeline(x, k1, k2, index=None, **options):
    x = x.to(DEVICE)
    index = knn.knn(x, k1)[1] if index is None else index.to(DEVICE)
    rows = k_reciprocal.k_reciprocal(x, index, k1, k2, **options)
    crow, col, distance = jaccard.jaccard(*rows)
    full = torch.ones(len(x), len(x), device=DEVICE)
    full[torch.arange(len(x), device=DEVICE).repeat_interleave(crow.diff()), col] = distance
    return full.cpu().numpy()


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(found < 1, expected < 1)


@pytest.mark.parametrize(("name", "k1", "k2"), [("jaccard_n64_d32", 10, 3), ("jaccard_n64_d32", 30, 6)])
def test_golden(golden, name, k1, k2):
    file = golden(name)
    assert_near(pipeline(file.tensor("features"), k1, k2), file.matrix(f"dist_k{k1}_{k2}"))


@pytest.mark.parametrize("n", [5, 20])
def test_golden_fewer_points_than_k1(golden, n):
    file = golden("jaccard_edge_fewer_than_k1")
    assert_near(pipeline(file.tensor(f"features_n{n}"), 30, 6), file[f"dist_k1_clipped_n{n}"])


@pytest.mark.parametrize(("name", "k1", "k2"), [("jaccard_edge_duplicates", 10, 1), ("jaccard_edge_tight", 20, 6)])
def test_golden_from_stored_lists(golden, name, k1, k2):
    file = golden(name)
    found = pipeline(file.tensor("features"), k1, k2, file.tensor(f"rank_k{k1}_{k2}"))
    assert_near(found, file[f"dist_k{k1}_{k2}"])


def test_golden_odd_k1(golden):
    file = golden("jaccard_edge_odd_k1")
    x = file.tensor("features")
    index = reference_knn(x, 5)[1]  # 150 rows are many to search with an interpreter
    assert_near(pipeline(x, 5, 2, index), file["dist_k5_2"])


# through the ops: on a CPU the backend is refused, so its functions are called as the dispatch would call them


def test_ops_hand_over_to_the_kernels(clustered):
    from fastreid_u.ops import jaccard as ops_jaccard
    from fastreid_u.ops import k_reciprocal as ops_encoding
    from fastreid_u.ops import knn as ops_knn

    x = clustered(26, 12).to(DEVICE)
    near = ops_knn._triton(x, 8, gallery=None)
    assert torch.equal(near[1].cpu(), reference_knn(x.cpu(), 8)[1])
    rows = ops_encoding._triton(x, 8, 2, knn=near, compat=False)
    assert (rows.layout, rows.dtype, rows.col_indices().dtype) == (torch.sparse_csr, torch.float32, torch.int64)
    expected = reference_encoding.k_reciprocal_encoding(x.cpu(), 8, 2, knn=(None, near[1].cpu()))
    torch.testing.assert_close(rows.to_dense().cpu(), expected.to_dense(), atol=1e-6, rtol=0)
    full = ops_jaccard._triton_distance(x, 8, 2, knn=near, compat=False)
    numba = ops_jaccard.jaccard_distance(x.cpu(), 8, 2, knn=tuple(part.cpu() for part in near), backend="numba")
    assert torch.equal(full.cpu(), numba)
    assert ops_jaccard._triton_graph(
        x[:0], k1=3, k2=2, radius=1.0, knn=(near[0][:0], near[1][:0]), compat=False
    ).shape == (0, 0)


def test_ops_refuse_the_backend_on_a_cpu(clustered):
    from fastreid_u.ops.jaccard import jaccard_graph
    from fastreid_u.ops.knn import knn as search_op

    with pytest.raises(RuntimeError, match="knn: backend must run on cpu tensors, got 'triton'"):
        search_op(clustered(5, 3), 2, backend="triton")
    with pytest.raises(RuntimeError, match="jaccard_graph: backend must run on cpu tensors, got 'triton'"):
        jaccard_graph(clustered(40, 3), backend="triton")

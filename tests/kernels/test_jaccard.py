# SPDX-License-Identifier: Apache-2.0
"""The Triton Jaccard distance, and the label step down to it: on a GPU if there is one, else interpreted on few rows.

Everything here is equality: overlaps of integer rows and the distances made of them have one right answer.
"""

import numpy as np
import pytest
import torch

from fastreid_u.cpu import jaccard as cpu_jaccard
from fastreid_u.kernels import jaccard, k_reciprocal, knn
from fastreid_u.reference import k_reciprocal as reference_encoding
from fastreid_u.reference.knn import knn as reference_knn

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 2e-6  # recommended with the golden files


def assert_same_graph(crow, col, mass, weight, radius):
    """Against sums of minima over dense rows, in integers."""
    n = len(crow) - 1
    matrix = torch.zeros(n, n, dtype=torch.int64)
    matrix[torch.arange(n).repeat_interleave(crow.diff()), col.long()] = mass.long()
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
    *parts, weight = k_reciprocal.k_reciprocal(x.to(DEVICE), index.to(DEVICE), k1, k2)
    rows = [part.cpu() for part in parts]
    lists = np.ascontiguousarray(index[:, :k1].numpy(), np.int32)
    for radius in (0.0, 0.2, 0.6, 1.0):
        found = assert_same_graph(*rows, weight, radius)
        expected = cpu_jaccard.jaccard_graph(x.numpy(), lists, k2, radius)
        for part, array in zip(found, expected, strict=True):
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


# after the search and the encoding, against published numbers


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

# SPDX-License-Identifier: Apache-2.0
"""dbscan: labels equal scikit-learn's to the number, on any graph, from any input form, on any number of threads."""

import re
import warnings

import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreid_u
from fastreid_u import _env
from fastreid_u.ops import dbscan as op
from fastreid_u.ops._dispatch import missing
from fastreid_u.reference import dbscan as reference

GPU_BACKENDS = [
    pytest.param(
        name, marks=[pytest.mark.gpu, pytest.mark.skipif(missing(name) is not None, reason=str(missing(name)))]
    )
    for name in ("cuda", "cupy")
]
BACKENDS = ["cpp", "reference", *GPU_BACKENDS]


def stored(dense: np.ndarray, radius: float = 5.0) -> scipy.sparse.csr_array:
    """The entries up to ``radius`` as sparse rows, zeros stored."""
    row, column = np.nonzero(dense <= radius)
    return scipy.sparse.csr_array((dense[row, column], (row, column)), shape=dense.shape)


def random_graph(
    rng: np.random.Generator, n: int, *, symmetric: bool = True, density: float = 0.2, dtype: type = np.float32
) -> np.ndarray:
    """Dense distances on a grid of tenths, so that many equal eps; 9 where nothing is near."""
    graph = np.where(rng.random((n, n)) < density, np.round(rng.random((n, n)), 1), 9.0)
    if symmetric:
        graph = np.minimum(graph, graph.T)
    np.fill_diagonal(graph, np.where(rng.random(n) < 0.9, 0.0, 0.7))
    return graph.astype(dtype)


def points(xs: list[float]) -> np.ndarray:
    """Distances of points on a line."""
    x = np.asarray(xs, np.float64)
    return np.abs(x[:, None] - x[None, :])


def sklearn_fit(graph: object, eps: float, min_samples: int) -> sklearn.cluster.DBSCAN:
    return sklearn.cluster.DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(graph)


def run(graph: object, eps: object, min_samples: int, backend: str) -> np.ndarray:
    """Labels by one backend; those of a GPU get the graph there."""
    if backend in ("cuda", "cupy"):
        graph = on_gpu(graph)
    return fastreid_u.dbscan(graph, eps, min_samples, backend=backend).cpu().numpy()


def on_gpu(graph: object) -> torch.Tensor:
    if scipy.sparse.issparse(graph):
        rows = graph.tocsr()
        parts = (torch.from_numpy(np.asarray(part)) for part in (rows.indptr, rows.indices, rows.data))
        return torch.sparse_csr_tensor(*parts, size=rows.shape).cuda()
    return torch.as_tensor(graph).cuda()


# Agreement with scikit-learn


@pytest.mark.parametrize("backend", BACKENDS)
def test_stored_labels_at_exact_ties(backend: str, golden) -> None:
    ties = golden("dbscan_ties")
    names = [name for name in ties if name.startswith("labels_")]
    assert len(names) == 27
    for name in names:
        case = name.removeprefix("labels_")
        settings_ = re.search(r"eps([\d.]+)(?:_min(\d+))?$", case)
        eps, min_samples = float(settings_[1]), int(settings_[2] or 4)
        dense = ties["dist_" + (case if settings_[2] is None else case[: settings_.start() - 1])]
        for graph in (dense, stored(dense)):
            np.testing.assert_array_equal(run(graph, eps, min_samples, backend), ties[name], err_msg=name)
            cores = fastreid_u.DBSCAN(eps, min_samples=min_samples).fit(graph).core_sample_indices_
            np.testing.assert_array_equal(cores, ties[f"core_{case}"], err_msg=name)


@pytest.mark.parametrize("name", ["jaccard_n64_d32", "jaccard_n257_d128", "jaccard_n600_d256"])
@pytest.mark.parametrize("k", ["k30_6", "k20_6", "k30_1", "k10_3"])
def test_stored_labels_on_published_distances(name: str, k: str, golden) -> None:
    file = golden(name)
    dense = file.matrix(f"dist_{k}")
    eps = [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7]
    for graph in (dense, stored(dense, 0.999)):
        labels = fastreid_u.dbscan(graph, eps, 4, radius=0.99).numpy()
        for row, e in zip(labels, eps, strict=True):
            np.testing.assert_array_equal(row, file[f"labels_{k}_eps{e:.2f}"], err_msg=f"eps {e}")
            cores = fastreid_u.DBSCAN(e, min_samples=4).fit(graph).core_sample_indices_
            np.testing.assert_array_equal(cores, file[f"core_{k}_eps{e:.2f}"], err_msg=f"eps {e}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_sklearn_on_random_graphs(backend: str, symmetric: bool, dtype: type) -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(40):
        n = int(rng.integers(1, 70))
        dense = random_graph(rng, n, symmetric=symmetric, density=rng.uniform(0.01, 0.2), dtype=dtype)
        min_samples = int(rng.integers(1, 6))
        for graph in (dense, stored(dense)):
            labels = run(graph, [0.2, 0.6], min_samples, backend)
            for row, eps in zip(labels, [0.2, 0.6], strict=True):
                expected = sklearn_fit(graph, eps, min_samples)
                np.testing.assert_array_equal(row, expected.labels_)
                border = np.setdiff1d(np.flatnonzero(expected.labels_ >= 0), expected.core_sample_indices_)
                seen |= {"noise"} if (expected.labels_ == -1).any() else set()
                seen |= {"border"} if len(border) else set()
                seen.add(f"{min(expected.labels_.max() + 1, 2)} clusters")
    assert seen == {"noise", "border", "0 clusters", "1 clusters", "2 clusters"}  # the cases that matter did occur


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    xs=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    eps=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    min_samples=st.integers(1, 5),
)
def test_equals_sklearn_on_lines_of_points(xs: list[int], eps: float, min_samples: int) -> None:
    graph = points(xs)
    expected = sklearn_fit(graph, eps, min_samples).labels_
    np.testing.assert_array_equal(fastreid_u.dbscan(graph, eps, min_samples), expected)
    np.testing.assert_array_equal(fastreid_u.dbscan(stored(graph), eps, min_samples), expected)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_number_of_threads(threads: int, symmetric: bool) -> None:
    rng = np.random.default_rng(5)
    n = 3001
    row = rng.integers(0, n, 6 * n)
    column = np.where(rng.random(len(row)) < 0.99, row // 40 * 40 + rng.integers(0, 40, len(row)), row[::-1]) % n
    graph = scipy.sparse.csr_array((np.round(rng.random(6 * n), 1) + 0.1, (row, column)), shape=(n, n))
    graph = graph.maximum(graph.T) if symmetric else graph
    shuffle = rng.permutation(n)
    graph = graph[shuffle][:, shuffle]
    expected = sklearn_fit(graph, 0.5, 4).labels_
    assert expected.max() > 20
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        np.testing.assert_array_equal(fastreid_u.dbscan(graph, 0.5, 4), expected)
    finally:
        torch.set_num_threads(before)


# The rules, one by one


def two_groups_and_a_border_point() -> np.ndarray:
    """Points 0-3 and 5-8 are copies of each other; 4 is within 1.5 of one point of each group; 9 is alone."""
    graph = points([0, 0, 0, 0, 1.5, 3, 3, 3, 3, 9])
    graph[4, [1, 2, 3, 6, 7, 8]] = graph[[1, 2, 3, 6, 7, 8], 4] = 9
    return graph


@pytest.mark.parametrize("backend", BACKENDS)
def test_border_point_joins_the_first_of_its_clusters(backend: str) -> None:
    graph = two_groups_and_a_border_point()
    assert run(graph, 1.5, 4, backend).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, -1]
    assert run(graph, 1.5, 3, backend).tolist() == [0] * 9 + [-1]  # three neighbours: now it is core, and a bridge
    swapped = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert run(graph[np.ix_(swapped, swapped)], 1.5, 4, backend).tolist() == [-1, 0, 0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_inclusive_in_the_dtype_of_the_graph(backend: str) -> None:
    for dtype in (np.float32, np.float64):
        at = np.asarray(0.6, dtype)
        graph = np.array([[0, at], [at, 0]], dtype)
        beyond = np.where(graph > 0, np.nextafter(at, dtype(1)), 0).astype(dtype)
        assert run(graph, 0.6, 2, backend).tolist() == [0, 0]
        assert run(graph, np.float64(0.6), 2, backend).tolist() == [0, 0]  # scikit-learn's answer depends on the scalar
        assert run(beyond, 0.6, 2, backend).tolist() == [-1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_diagonal_is_zero_and_a_stored_one_counts_as_it_is(backend: str) -> None:
    pair = scipy.sparse.csr_array(([0.1, 0.1], ([0, 1], [1, 0])), shape=(3, 3))
    far_from_itself = scipy.sparse.csr_array(([0.9, 0.1, 0.1, 0.9], ([0, 0, 1, 1], [0, 1, 0, 1])), shape=(3, 3))
    for graph, expected in ((pair, [0, 0, -1]), (far_from_itself, [-1, -1, -1])):
        assert run(graph, 0.5, 2, backend).tolist() == expected
        assert sklearn_fit(graph, 0.5, 2).labels_.tolist() == expected
    assert run(scipy.sparse.csr_array((3, 3)), 0.5, 1, backend).tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_asymmetric_graph_is_read_by_rows(backend: str) -> None:
    one_way = scipy.sparse.csr_array(([0.1], ([0], [1])), shape=(2, 2))
    assert run(one_way, 0.5, 1, backend).tolist() == [0, 0]  # 0 reaches 1
    assert run(one_way.T.tocsr(), 0.5, 1, backend).tolist() == [0, 1]  # 1 reaches 0, which came first


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_one_way_chain_needs_many_passes(backend: str) -> None:
    """Against the order of the points: every pass of the parallel algorithm may move the smallest core by one link."""
    n = 40
    chain = np.full((n, n), 9.0)
    np.fill_diagonal(chain, 0)
    order = np.random.default_rng(0).permutation(n)
    chain[order[:-1], order[1:]] = 0.1
    expected = sklearn_fit(chain, 0.5, 2).labels_
    np.testing.assert_array_equal(run(chain, 0.5, 2, backend), expected)
    assert len(set(expected)) > 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    copies = np.zeros((50, 50), np.float32)
    assert run(copies, 0.1, 50, backend).tolist() == [0] * 50
    assert run(copies, 0.1, 51, backend).tolist() == [-1] * 50
    alone = np.full((50, 50), 2.0, np.float32)
    np.fill_diagonal(alone, 0)
    assert run(alone, 0.1, 2, backend).tolist() == [-1] * 50
    assert run(alone, 0.1, 1, backend).tolist() == list(range(50))
    assert run(np.array([[0.0, np.inf], [np.inf, 0.0]]), 1e30, 1, backend).tolist() == [0, 1]
    for n, expected in ((0, []), (1, [0])):
        for graph in (np.zeros((n, n), np.float32), scipy.sparse.csr_array((n, n), dtype=np.float32)):
            assert run(graph, 0.5, 1, backend).tolist() == expected
            assert run(graph, [0.5, 0.6], 1, backend).tolist() == [expected] * 2


# Every form of a graph


def forms(dense: np.ndarray) -> dict[str, object]:
    sparse = stored(dense)
    rng = np.random.default_rng(1)
    shuffled = sparse.copy()
    for begin, end in zip(sparse.indptr[:-1], sparse.indptr[1:], strict=True):
        order = begin + rng.permutation(end - begin)
        shuffled.indices[begin:end], shuffled.data[begin:end] = sparse.indices[order], sparse.data[order]
    shuffled.has_sorted_indices = False
    tensor = torch.from_numpy(dense)
    parts = [torch.from_numpy(np.asarray(part)) for part in (sparse.indptr, sparse.indices, sparse.data)]
    wide = [part.long() for part in parts[:2]]
    columns, pairs = sparse.tocsc(), sparse.tocoo()
    by_column = [torch.from_numpy(np.asarray(part)) for part in (columns.indptr, columns.indices, columns.data)]
    pair = np.random.default_rng(2).permutation(len(pairs.data))
    index = np.stack([pairs.row[pair], pairs.col[pair]])
    return {
        "numpy": dense,
        "fortran": np.asfortranarray(dense),
        "read-only": np.frombuffer(dense.tobytes(), dense.dtype).reshape(dense.shape),
        "torch": tensor,
        "not contiguous": torch.from_numpy(np.repeat(dense, 2, axis=1))[:, ::2],
        "requires grad": tensor.clone().requires_grad_(),
        "csr array": sparse,
        "csr matrix": scipy.sparse.csr_matrix(sparse),
        "coo": sparse.tocoo(),
        "csc": sparse.tocsc(),
        "unsorted": shuffled,
        "torch csr int32": torch.sparse_csr_tensor(*parts, size=dense.shape),
        "torch csr int64": torch.sparse_csr_tensor(*wide, parts[2], size=dense.shape),
        "torch csc": torch.sparse_csc_tensor(*by_column, size=dense.shape),
        "torch coo": torch.sparse_coo_tensor(torch.from_numpy(index), torch.from_numpy(pairs.data[pair]), dense.shape),
    }


def as_array(graph: object) -> np.ndarray:
    """The stored values of any form, in their order."""
    if isinstance(graph, torch.Tensor):
        if graph.layout == torch.sparse_coo:
            return graph._values().numpy()
        return (graph.detach() if graph.layout == torch.strided else graph.values()).numpy()
    return graph.data if scipy.sparse.issparse(graph) else graph


FORMS = list(forms(np.zeros((2, 2))))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accepts(form: str, dtype: type) -> None:
    dense = random_graph(np.random.default_rng(8), 60, density=0.05, dtype=dtype)
    graph = forms(dense)[form]
    before = as_array(graph).copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = fastreid_u.dbscan(graph, 0.5, 3)
    assert isinstance(labels, torch.Tensor)
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels, sklearn_fit(dense, 0.5, 3).labels_)
    np.testing.assert_array_equal(as_array(graph), before)  # left as it was


def test_accepts_integers_and_dlpack() -> None:
    class Foreign:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__

    graph = torch.tensor([[0, 1, 5], [1, 0, 5], [5, 5, 0]])
    assert fastreid_u.dbscan(graph, 1, 2).tolist() == [0, 0, -1]
    assert fastreid_u.dbscan(Foreign(graph.double()), 1, 2).tolist() == [0, 0, -1]


def test_several_eps_give_a_row_each() -> None:
    graph = random_graph(np.random.default_rng(2), 50)
    eps = (0.6, 0.1, 0.3)
    labels = fastreid_u.dbscan(graph, eps, 3)
    assert labels.shape == (3, 50)
    for row, e in zip(labels, eps, strict=True):
        assert torch.equal(row, fastreid_u.dbscan(graph, e, 3))
    assert fastreid_u.dbscan(graph, np.array([0.6]), 3).shape == (1, 50)


# Refusals


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True])
def test_refuses_nan_and_negative_distances(backend: str, sparse: bool) -> None:
    for value, message in ((np.nan, "hold no NaN"), (-0.1, "hold no negative distance")):
        graph = np.zeros((9, 9))
        graph[3, 5] = graph[6, 2] = value
        if sparse:
            graph = scipy.sparse.csr_array(graph)
        with pytest.raises(ValueError, match=f"dbscan: graph must {message}, got one in row 3"):
            run(graph, 0.5, 2, backend)


def csr(indptr: list[int], indices: list[int], n: int = 3) -> torch.Tensor:
    data = torch.full((len(indices),), 0.1)
    return torch.sparse_csr_tensor(
        torch.tensor(indptr), torch.tensor(indices), data, size=(n, n), check_invariants=False
    )


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (csr([0, 1, 2, 3], [0, 3, 1]), r"hold columns in \[0, N\), got one outside in row 1"),
        (csr([0, 1, 2, 3], [0, -1, 1]), r"hold columns in \[0, N\), got one outside in row 1"),
        (csr([0, 2, 1, 3], [0, 1, 2]), "have row pointers that start at 0, never fall .* row 1"),
        (csr([0, 1, 2, 9], [0, 1, 2]), "have row pointers .* row 2"),
        (csr([0, 0, 2, 3], [1, 1, 2]), "store every pair once, got one twice in row 1"),
        (csr([0, 0, 3, 3], [1, 0, 1]), "store every pair once, got one twice in row 1"),
        (np.zeros((2, 3)), r"be square, got shape \(2, 3\)"),
        (scipy.sparse.csr_array((2, 3)), r"be square, got shape \(2, 3\)"),
        (np.zeros(4), "be 2-D"),
    ],
)
def test_refuses_malformed_graphs(graph: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"dbscan: graph must {message}"):
        fastreid_u.dbscan(graph, 0.5)


def test_refuses_other_kinds() -> None:
    for graph, message in (
        (torch.eye(4).to_sparse_bsr((2, 2)), "dbscan: graph must be torch.sparse_csr, sparse_csc or .*, got torch.sp"),
        (np.eye(3, dtype=bool), "dbscan: graph must hold real distances, got torch.bool"),
        ("graph", "dbscan: graph must be a tensor or an array"),
    ):
        with pytest.raises(TypeError, match=message):
            fastreid_u.dbscan(graph, 0.5)


def test_refuses_bad_settings() -> None:
    graph = np.zeros((3, 3))
    for eps in (0.0, -1.0, float("inf"), float("nan"), [0.5, 0.0]):
        with pytest.raises(ValueError, match="dbscan: eps must be positive and finite"):
            fastreid_u.dbscan(graph, eps)
    with pytest.raises(ValueError, match="dbscan: eps must hold at least one number"):
        fastreid_u.dbscan(graph, [])
    with pytest.raises(ValueError, match=r"dbscan: eps must be at most radius=0\.6, got 0\.7"):
        fastreid_u.dbscan(graph, [0.5, 0.7], radius=0.6)
    assert fastreid_u.dbscan(graph, [0.5, 0.6], radius=0.6).shape == (2, 3)
    with pytest.raises(ValueError, match="dbscan: min_samples must be at least 1, got 0"):
        fastreid_u.dbscan(graph, 0.5, 0)
    with pytest.raises(TypeError, match=r"dbscan: min_samples must be an integer, got 4\.0"):
        fastreid_u.dbscan(graph, 0.5, 4.0)
    with pytest.raises(ValueError, match="dbscan: backend must be one of"):
        fastreid_u.dbscan(graph, 0.5, backend="gpu")


@pytest.mark.skipif(_env.gpu().present, reason="only where there is no GPU")
@pytest.mark.parametrize("backend", ["cuda", "cupy"])
def test_gpu_backends_say_why_they_cannot_run(backend: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(str(missing(backend)))):
        fastreid_u.dbscan(np.zeros((3, 3)), 0.5, backend=backend)
    with pytest.raises(RuntimeError, match=re.escape(str(missing(backend)))):
        fastreid_u.pseudo_labels(torch.eye(40), backend=backend)


def test_auto_takes_the_compiled_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("auto must not fall back to the reference")

    monkeypatch.setattr(op, "_reference", forbidden)
    assert fastreid_u.dbscan(np.zeros((3, 3)), 0.5, 2).tolist() == [0, 0, 0]


# A clustering, judged by the properties that define it (symmetric graphs)


def violations(graph: np.ndarray, eps: float, min_samples: int, labels: np.ndarray) -> set[str]:
    """Which of the five defining properties ``labels`` break."""
    near = graph <= graph.dtype.type(eps)
    core = near.sum(axis=1) >= min_samples
    linked = near & core[:, None] & core[None, :]
    pieces, piece = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(linked), directed=False)
    first = [next(i for i in np.flatnonzero(piece == p)) for p in range(pieces) if core[piece == p].any()]
    broken = set()
    for i in range(len(labels)):
        offers = {labels[j] for j in np.flatnonzero(near[:, i] & core)}
        if core[i] and labels[i] < 0:
            broken.add("a core point is in a cluster")
        if core[i] and any(labels[j] != labels[i] for j in np.flatnonzero(linked[i])):
            broken.add("near core points share a cluster")
        if not core[i] and offers and labels[i] != min(offers):
            broken.add("a border point is in the first cluster that has a core near it")
        if not core[i] and not offers and labels[i] != -1:
            broken.add("a point near no core is noise")
    if [labels[i] for i in sorted(first)] != list(range(len(first))):
        broken.add("clusters are the connected pieces, numbered by their smallest core")
    return broken


@pytest.mark.parametrize("backend", BACKENDS)
def test_properties(backend: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(15):
        graph = random_graph(rng, 40, density=0.06)
        labels = run(graph, 0.5, 3, backend)
        assert violations(graph, 0.5, 3, labels) == set()


@pytest.mark.parametrize(
    ("wrong", "broken"),
    [
        ([-1, 0, 0, 0, 0, 1, 1, 1, 1, -1], "a core point is in a cluster"),
        ([0, 0, 0, 2, 0, 1, 1, 1, 1, -1], "near core points share a cluster"),
        ([0, 0, 0, 0, 1, 1, 1, 1, 1, -1], "a border point is in the first cluster that has a core near it"),
        ([0, 0, 0, 0, -1, 1, 1, 1, 1, -1], "a border point is in the first cluster that has a core near it"),
        ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], "a point near no core is noise"),
        ([1, 1, 1, 1, 0, 0, 0, 0, 0, -1], "clusters are the connected pieces, numbered by their smallest core"),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, -1], "clusters are the connected pieces, numbered by their smallest core"),
        ([0, 0, 0, 0, 0, 2, 2, 2, 2, -1], "clusters are the connected pieces, numbered by their smallest core"),
    ],
)
def test_the_verifier_refuses_wrong_labels(wrong: list[int], broken: str) -> None:
    graph = two_groups_and_a_border_point()
    right = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, -1])
    assert violations(graph, 1.5, 4, right) == set()
    assert broken in violations(graph, 1.5, 4, np.array(wrong))


# The reference is the published definition


def test_reference_equals_sklearn() -> None:
    rng = np.random.default_rng(21)
    for trial in range(30):
        dense = random_graph(rng, int(rng.integers(1, 40)), symmetric=trial % 2 == 0, density=0.1)
        sparse = stored(dense)
        parts = [torch.from_numpy(np.asarray(part)) for part in (sparse.indptr, sparse.indices, sparse.data)]
        for graph in (dense, sparse, torch.from_numpy(dense), torch.sparse_csr_tensor(*parts, size=dense.shape)):
            expected = sklearn_fit(dense, 0.4, 3)
            np.testing.assert_array_equal(reference.dbscan(graph, 0.4, 3), expected.labels_)
            cores = reference.core_points(graph, 0.4, 3).nonzero().flatten()
            np.testing.assert_array_equal(cores, expected.core_sample_indices_)
    assert reference.dbscan(dense, [0.4, 0.5]).shape == (2, len(dense))
    with pytest.raises(ValueError, match=r"eps must be at most radius=0\.5"):
        reference.dbscan(dense, 0.6, radius=0.5)


def test_more_neighbours_than_there_are_points():
    assert (fastreid_u.dbscan(torch.zeros(5, 5), 0.5, 10**30) == -1).all()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_dbscan_on_another_stream_of_a_graph_that_starts_anywhere_in_memory(clustered, backend):
    graph = fastreid_u.jaccard_graph(clustered(2999, 32), radius=0.7)
    crow, col, values = (part.cuda() for part in (graph.crow_indices(), graph.col_indices(), graph.values()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        memory = torch.full((1 + len(values),), torch.nan, device="cuda")  # an error, if it is read too early
        torch.cuda._sleep(50_000_000)
        memory[1:] = values
        late = torch.sparse_csr_tensor(crow, col, memory[1:], size=graph.shape)
        found = fastreid_u.dbscan(late, [0.5, 0.6], backend=backend)
    stream.synchronize()
    assert torch.equal(found.cpu(), fastreid_u.dbscan(graph, [0.5, 0.6], backend="cpp"))

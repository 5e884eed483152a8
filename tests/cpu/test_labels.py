# SPDX-License-Identifier: Apache-2.0
"""The label pipeline on a CPU: published numbers, the reference, collapsed features, memory, threads."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u import _env
from fastreid_u.cpu import _threads
from fastreid_u.cpu.jaccard import build_index, least_overlap, to_distance
from fastreid_u.cpu.rows import Rows, bits
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_distance, jaccard_graph
from fastreid_u.ops.k_reciprocal import k_reciprocal_encoding
from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.reference import jaccard as reference_jaccard
from fastreid_u.reference import knn as reference_knn

TOLERANCE = 2e-6  # recommended with the golden files
CLUSTERED = ["jaccard_n64_d32", "jaccard_n257_d128", "jaccard_n600_d256"]
COUNTS = [(30, 6), (20, 6), (30, 1), (10, 3)]
EDGES = {
    "jaccard_edge_duplicates": [(30, 6), (10, 3), (10, 1)],
    "jaccard_edge_tight": [(30, 6), (20, 6)],
    "jaccard_edge_tight_noise_level": [(30, 6), (20, 6)],
}
# the reference stays pinned to the published numbers too, now that "auto" no longer runs it
LABELS_BY = {"numba": "cpp", "reference": "reference"}  # numba encodes, the compiled core clusters
backends = pytest.mark.parametrize("backend", ["numba", "reference"])


def assert_near(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(found.numpy() < 1, expected < 1)


def stored(graph):
    """A graph as a dense matrix with 1 where nothing is stored."""
    row = torch.arange(len(graph)).repeat_interleave(graph.crow_indices().diff())
    dense = torch.ones(graph.shape)
    dense[row, graph.col_indices()] = graph.values()
    return dense


@backends
@pytest.mark.parametrize(("k1", "k2"), COUNTS)
@pytest.mark.parametrize("name", CLUSTERED)
def test_golden(golden, name, k1, k2, backend):
    file = golden(name)
    x = file.tensor("features")
    nearest = knn(x, k1, backend=backend)
    assert_near(jaccard_distance(x, k1, k2, knn=nearest, backend=backend), file.matrix(f"dist_k{k1}_{k2}"))
    record = file.meta["params"]["dbscan"][f"k{k1}_{k2}"]
    stable = [eps for eps in record if record[eps]["labels_stable_under_eps_pm_4e_6"]]
    assert len(stable) >= 3, "the file should be able to test something"
    found = pseudo_labels(x, eps=[float(eps) for eps in stable], k1=k1, k2=k2, knn=nearest, backend=LABELS_BY[backend])
    for labels, eps in zip(found, stable, strict=True):
        np.testing.assert_array_equal(labels.numpy(), file[f"labels_k{k1}_{k2}_eps{eps}"], err_msg=f"eps {eps}")


@backends
@pytest.mark.parametrize(("name", "k1", "k2"), [(name, *counts) for name in EDGES for counts in EDGES[name]])
def test_golden_copies_and_tight_clusters_from_stored_lists(golden, name, k1, k2, backend):
    file = golden(name)
    rank = file.tensor(f"rank_k{k1}_{k2}")
    given = torch.zeros(rank.shape), rank
    found = jaccard_distance(file.tensor("features"), k1, k2, knn=given, backend=backend)
    assert_near(found, file[f"dist_k{k1}_{k2}"])


@backends
@pytest.mark.parametrize(("k1", "k2"), [(25, 6), (15, 4), (9, 1), (5, 2)])
def test_golden_odd_k1(golden, k1, k2, backend):
    file = golden("jaccard_edge_odd_k1")
    assert_near(jaccard_distance(file.tensor("features"), k1, k2, backend=backend), file[f"dist_k{k1}_{k2}"])


@backends
def test_golden_rows_not_of_unit_length(golden, backend):
    file = golden("jaccard_edge_unnormalised")
    x = file.tensor("features")
    assert_near(jaccard_distance(x, backend=backend), file["dist_fastreid_k30_6"])
    assert_near(jaccard_distance(x, compat=True, backend=backend), file["dist_clustercontrast_k30_6"])


@backends
@pytest.mark.filterwarnings("ignore:.*clipped to them")
@pytest.mark.parametrize("n", [5, 20])
def test_golden_fewer_points_than_k1(golden, n, backend):
    file = golden("jaccard_edge_fewer_than_k1")
    assert_near(jaccard_distance(file.tensor(f"features_n{n}"), backend=backend), file[f"dist_k1_clipped_n{n}"])


def features(case):
    """One of the kinds of data that have ties, hubs, copies or no structure; sizes from nothing to 180."""
    rng = np.random.default_rng(case)
    n, d = [0, 1, 2, 3, int(rng.integers(4, 181))][min(case, 4)], int(rng.integers(1, 20))
    x = rng.normal(size=(n, d))
    kind = ["noise", "copies", "grid", "common mean", "zero rows", "identities", "hub"][case % 7]
    if kind == "copies":
        x = x[rng.integers(0, max(1, n // 4), n)]
    elif kind == "grid":
        x = np.round(x)
    elif kind == "common mean":
        x = x * 1e-3 + 7
    elif kind == "zero rows":
        x[rng.random(n) < 0.3] = 0
    elif kind == "identities":
        x = x[rng.integers(0, max(1, n // 15), n)] * 3 + 0.5 * x
    elif kind == "hub":
        x = x + 4 * np.sign(rng.normal(size=(n, 1)))
        x[: n // 10] *= 0.01
    k1 = int(rng.integers(1, 41))
    return torch.from_numpy(x).float(), k1, int(rng.integers(1, min(k1, 9) + 1)), rng


@pytest.mark.filterwarnings("ignore:.*(clipped to them|more than the data have)")
@pytest.mark.parametrize("case", range(42))
def test_equals_the_reference(case):
    x, k1, k2, rng = features(case)
    if len(x) and case % 2:  # lists of a search; else, on odd rounds, whatever lists: hubs, rows without themselves
        nearest = knn(x, k1, backend="numba")
        for found, expected in zip(nearest, reference_knn.knn(x, min(k1, len(x))), strict=True):
            assert torch.equal(found, expected)
    elif len(x):
        k1 = min(k1, len(x))
        k2 = min(k2, k1)
        weight = rng.pareto(0.7, len(x)) + 1e-9
        rank = np.stack([rng.choice(len(x), k1, replace=False, p=weight / weight.sum()) for _ in x])
        nearest = torch.zeros(rank.shape), torch.from_numpy(rank)
    else:
        nearest = None
    options = {"k1": k1, "k2": k2, "knn": nearest, "compat": case % 5 == 0}

    v = [k_reciprocal_encoding(x, backend=backend, **options).to_dense() for backend in ("numba", "reference")]
    torch.testing.assert_close(*v, atol=1e-6, rtol=0)
    distance = jaccard_distance(x, backend="numba", **options)
    exact = reference_jaccard.jaccard_distance(x.double(), **{**options, "k1": min(k1, max(1, len(x)))})
    torch.testing.assert_close(distance, exact.float(), atol=1e-6, rtol=0)
    assert torch.equal(distance, distance.T)

    eps = [0.5, *rng.uniform(0.05, 0.97, 2).tolist()]
    min_samples = int(rng.integers(1, 25))
    labels = pseudo_labels(x, eps=eps, min_samples=min_samples, backend="cpp", **options)
    assert labels.shape == (3, len(x))
    for e, row in zip(eps, labels, strict=True):
        graph = jaccard_graph(x, radius=e, backend="numba", **options)
        near = torch.where(distance <= np.float32(e), distance, torch.ones(()))
        assert torch.equal(stored(graph), near)
        assert torch.equal(row, dbscan(graph, e, min_samples, radius=e))
        if len(x) and ((exact - e).abs() < 4e-6).sum() == 0:
            dense = exact.clone().fill_diagonal_(0)  # a row missing from its own list still counts itself
            assert torch.equal(row, dbscan(dense, e, min_samples)), "labels of the float64 reference"


def test_pairs_at_an_atom_are_decided_as_in_exact_arithmetic(clustered):
    """4 of 6 rows shared and nothing else: J = 1/2. float32 sums put some of these beside it, integers none."""
    x = clustered(900, 24, spread=0.2)
    nearest = knn(x, 20)
    exact = reference_jaccard.jaccard_distance(x.double(), 20, 6, knn=nearest)
    atom = (exact - 0.5).abs() < 1e-12
    assert atom.sum() > 20
    assert (jaccard_distance(x, 20, 6, knn=nearest, backend="numba")[atom] == 0.5).all()
    published = jaccard_distance(x, 20, 6, knn=nearest, backend="reference")[atom]
    assert (published != 0.5).any(), "else this could not fail"
    labels = pseudo_labels(x, eps=0.5, k1=20, knn=nearest, backend="cpp")
    assert torch.equal(labels, dbscan(exact.masked_fill(atom, 0.5), 0.5))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.25, 0.4, 0.5, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("k2", [1, 3, 6, 7, 8, 127, 1000])
def test_least_overlap_is_the_threshold_of_the_stored_distance(eps, k2):
    weight = k2 << bits(k2)
    assert 2**30 <= 4 * weight < 2**33
    assert weight < 2**31
    least = least_overlap(eps, weight)
    at, below = to_distance(np.array([least, least - 1]), weight)
    assert at <= np.float32(eps)
    assert at < 1
    assert below > np.float32(eps) or below == 1


def random_rows(rng, n, weight):
    """Integer rows of one weight; a few columns are in most rows."""
    parts = []
    for _ in range(n):
        column = np.unique(np.concatenate([rng.integers(0, n, 6), rng.integers(0, 3, 2)]))
        cut = np.sort(rng.choice(np.arange(1, weight), len(column) - 1, replace=False))
        parts.append((np.array([0, len(column)]), column, np.diff(np.concatenate([[0], cut, [weight]]))))
    indptr = np.concatenate([[0], np.cumsum([len(column) for _, column, _ in parts])])
    column, value = (np.concatenate([part[at] for part in parts]).astype(np.int32) for at in (1, 2))
    return Rows(indptr, column, value)


@pytest.mark.parametrize("need", [1, 300, 571, 1000])
def test_prefixes_let_every_near_pair_pass(need):
    rows = random_rows(np.random.default_rng(need), 60, 1000)
    dense = np.zeros((60, 60), np.int64)
    for i in range(60):
        own = slice(rows.indptr[i], rows.indptr[i + 1])
        dense[i, rows.column[own]] = rows.mass[own]
    true = np.minimum(dense[:, None], dense[None]).sum(-1)

    index = build_index(rows, 1000, need, 1)
    prefix = np.zeros((60, 60), np.int64)
    for c in range(60):
        own = slice(index.start[c], index.start[c + 1])
        assert (np.diff(index.row[own]) > 0).all()
        prefix[index.row[own], c] = index.list_mass[own]
    passed = np.minimum(prefix[:, None], prefix[None]).sum(-1) >= index.enough
    assert passed[true >= need].all()
    assert prefix.sum() < dense.sum() or need == 1, "the filter should filter"


def collapsed(case):
    """2,000 features of a network that has gone wrong."""
    rng = np.random.default_rng(0)
    if case == "identical":
        x = np.ones((2000, 16))
    elif case == "fifth copies":
        x = np.repeat(rng.normal(size=(100, 16)), 20, axis=0) + 0.15 * rng.normal(size=(2000, 16))
        x[::5] = x[0]
    elif case == "nearly identical":
        x = 1 + 1e-2 * rng.normal(size=(2000, 256))
    elif case == "unstructured":
        x = rng.normal(size=(2000, 256))
    elif case == "common mean":
        x = rng.normal(size=(2000, 256)) + 5 * rng.normal(size=256)
    return F.normalize(torch.from_numpy(x).float())


@pytest.mark.parametrize("case", ["identical", "fifth copies", "nearly identical", "unstructured", "common mean"])
def test_collapsed_features(case):
    x = collapsed(case)
    nearest = knn(x, 30, backend="numba")
    labels = pseudo_labels(x, knn=nearest, backend="cpp")
    assert torch.equal(labels, dbscan(jaccard_graph(x, radius=0.6, knn=nearest, backend="numba"), 0.6))
    if case == "identical":
        assert (labels == 0).all()
    elif case == "fifth copies":
        assert (labels[::5] == labels[0]).all()
        assert labels[0] >= 0
        assert labels.max() > 50
    else:
        assert (labels == -1).float().mean() > 0.99


MEASURE = """
import json, re, sys, torch
from fastreid_u.ops.pseudo_labels import pseudo_labels
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
def features(n):
    if sys.argv[1] == "identical":
        return torch.ones(n, 16)
    x = torch.randn(n // 12 + 1, 16, generator=generator)[torch.randint(n // 12 + 1, (n,), generator=generator)]
    return torch.nn.functional.normalize(x + 0.4 * torch.randn(n, 16, generator=generator))
def peak():  # of this program alone: the maximum of getrusage begins at what its parent held
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
pseudo_labels(features(4100))  # compiled, and one block of scores in place
found = [peak()]
for n in (5000, 10000, 20000):
    labels = pseudo_labels(features(n))
    assert int(labels.max()) >= 0
    found.append(peak())
print(json.dumps(found))
"""


@pytest.mark.parametrize("data", ["identities", "identical"])
def test_memory_grows_with_n_not_its_square(data):
    """In MB of resident memory: a byte for each pair of 20,000 would be 381, the edges of identical features 4,600."""
    run = subprocess.run([sys.executable, "-c", MEASURE, data], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, *peaks = json.loads(run.stdout)
    growth = np.diff([before, *peaks])
    assert growth.sum() < 200, peaks
    assert growth[2] < 3 * max(growth[1], 20), peaks


def test_threads_do_not_matter(clustered):
    x = clustered(1200, 24, spread=0.9)
    x[::50] = x[7]
    usual = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            nearest = knn(x, 30, backend="numba")
            graph = jaccard_graph(x, radius=0.7, knn=nearest, backend="numba")
            v = k_reciprocal_encoding(x, knn=nearest, backend="numba")
            labels = pseudo_labels(x, eps=[0.5, 0.6], knn=nearest, backend="cpp")
            parts = [(m.crow_indices(), m.col_indices(), m.values()) for m in (graph, v)]
            found.append((*nearest, *parts[0], *parts[1], labels))
    finally:
        torch.set_num_threads(usual)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


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


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e18, 3e38])
def test_knn_of_features_at_the_ends_of_float32(scale):
    x = (torch.rand(70, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1) * scale
    found, expected = knn(x, 9, backend="numba"), reference_knn.knn(x, 9)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def test_several_eps_and_given_lists(clustered):
    x = clustered(200, 16)
    nearest = knn(x, 40)
    together = pseudo_labels(x, eps=(0.6, 0.4, 0.7), knn=nearest)
    assert together.shape == (3, 200)
    for eps, labels in zip((0.6, 0.4, 0.7), together, strict=True):
        assert torch.equal(labels, pseudo_labels(x, eps=eps))
    with pytest.raises(ValueError, match="pseudo_labels: eps must hold at least one number"):
        pseudo_labels(x, eps=[])
    with pytest.raises(ValueError, match=r"pseudo_labels: eps must lie in \(0, 1\), got 1.2"):
        pseudo_labels(x, eps=[0.5, 1.2])


def test_without_numba_the_reference_runs_and_says_why(clustered, monkeypatch):
    x = clustered(60, 8)
    expected = pseudo_labels(x, k1=10)
    monkeypatch.setattr(_env, "numba", lambda: _env.Capability("numba", False, "pip install numba"))
    with pytest.warns(RuntimeWarning, match="pip install numba, running the slow reference"):
        assert torch.equal(pseudo_labels(x, k1=10), expected)
    with pytest.raises(RuntimeError, match="backend must be able to run here, got 'numba': pip install numba"):
        knn(x, 3, backend="numba")


def test_kernels_compile_where_nothing_can_be_written(monkeypatch):
    real = _threads.njit

    def njit(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(function, **options)

    monkeypatch.setattr(_threads, "njit", njit)
    assert _threads.kernel(lambda a: a + 1)(1) == 2

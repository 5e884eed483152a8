# SPDX-License-Identifier: Apache-2.0
"""The label step on a CPU: published numbers, the reference, collapsed features, memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u import _env
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

# SPDX-License-Identifier: Apache-2.0
"""CACL's refinement: published outputs, toys worked out by hand, the N x N form, pairs beyond any radius."""

import numpy as np
import pytest
import scipy.sparse
import torch

from fastreid_u.ops import refine_clusters as module
from fastreid_u.ops._distance_graph import read_graph
from fastreid_u.ops.jaccard import jaccard_distance, jaccard_graph
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.ops.refine_clusters import refine_clusters
from fastreid_u.reference import refine_clusters as reference

FILES = ["cacl_refinement_n260_eps0.6_gap0.02", "cacl_refinement_n330_eps0.6_gap0.1"]
RULES = ["official", "mean_to_cluster"]


@pytest.mark.parametrize("name", FILES)
def test_golden(golden, name):
    file = golden(name)
    distance = torch.from_numpy(file.matrix("dist"))
    stored = file.tensor("dbscan_normal"), file.tensor("dbscan_tight")
    sparse = scipy.sparse.csr_array(torch.where(distance < 1, distance + 1, 0).numpy())  # explicit zeros stay
    sparse.data -= 1
    for graph in (distance, sparse):
        found = refine_clusters(None, *stored, graph=graph)
        np.testing.assert_array_equal(found.numpy(), file["final_labels"])
    np.testing.assert_array_equal(
        reference.refine_clusters(None, *stored, graph=distance).numpy(), file["final_labels"]
    )

    labels, tight = (module.own_classes(each) for each in stored)
    for graph in (distance, sparse):
        sums = module._sums_on_graph(read_graph("test", graph), labels, tight)
        part, cluster = module._scores(labels, tight, *sums, "official")
        np.testing.assert_allclose(part.numpy(), file["point_score_tight"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(cluster.numpy(), file["cluster_score"][labels.numpy()], rtol=1e-6, atol=1e-6)
    without = refine_clusters(None, *stored, graph=distance, singletons=False)
    assert without.max() + 1 == file.meta["params"]["final_clusters"]
    assert (without < 0).sum() == file.meta["params"]["final_singletons"]


def toy(sizes, inside, between):
    """A cluster in tight parts: distances inside the first part and inside the others, and between parts."""
    tight = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    distance = torch.full((len(tight),) * 2, between)
    for part, value in enumerate(inside):
        distance[(tight[:, None] == part) & (tight == part)] = value
    return distance.fill_diagonal_(0), torch.zeros_like(tight), tight


@pytest.mark.parametrize("run", [refine_clusters, reference.refine_clusters], ids=["op", "reference"])
def test_toys(run):
    distance, labels, tight = toy([16, 4], (0.3, 0.3), 0.55)
    part, cluster = reference.scores(distance, labels, tight, "official")
    assert cluster[0] == pytest.approx((16 * 15 + 4 * 3) * 0.3 / 400 + 2 * 64 * 0.55 / 400)
    assert part[0] == pytest.approx(16 * 4 * 0.55 / 16)  # 16 points, 4 others each
    assert part[19] == pytest.approx(4 * 16 * 0.55 / 256)
    official = run(None, labels, tight, graph=distance)
    assert official.tolist() == [*range(1, 17), 0, 0, 0, 0], "the core is dissolved, the stragglers stay"
    pruned = run(None, labels, tight, graph=distance, rule="mean_to_cluster")
    assert pruned.tolist() == [0] * 16 + [1, 2, 3, 4], "the core stays, the stragglers leave"
    assert run(None, labels, tight, graph=distance, rule="none").tolist() == [0] * 20
    assert run(None, labels, tight, graph=distance, ratio=0.1)[0] == 0, "2.2 counts a tenth"

    distance, labels, tight = toy([10, 10], (0.3, 0.3), 0.45)
    halves = run(None, labels, tight, graph=distance)
    assert halves.tolist() == list(range(1, 21)), "an even split dissolves all"
    same = run(None, labels, tight, graph=distance, rule="mean_to_cluster")
    assert same.tolist() == [0] * 20, "equal parts tie with their mean and stay"
    assert run(None, labels, labels, graph=distance).tolist() == [0] * 20, "nobody split it"


def labellings(rng, x):
    """Mid and tight labels with noise, splits, and tight parts that reach over two clusters."""
    labels, tight = pseudo_labels(x, eps=[0.6, 0.5], k1=15, k2=4)
    tight = tight.clone()
    for _ in range(4):
        moved = torch.from_numpy(rng.random(len(x)) < 0.05)
        tight[moved] = int(rng.integers(-1, int(tight.max()) + 2))
    return labels, tight.unique(return_inverse=True)[1] - int((tight == -1).any())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("number", range(4))
def test_equals_the_n_by_n_form(clustered, number, rule):
    rng = np.random.default_rng(number)
    x = clustered(160, 12, number=number, spread=0.9)
    labels, tight = labellings(rng, x)
    ratios = [1.0, 0.05, 0.7, 1.3] if rule == "official" else [1.0, 0.95, 0.9, 1.1]
    options = {"rule": rule, "ratio": ratios[number]}
    encoding = {"k1": 15, "k2": [4, 1, 3, 4][number], "compat": number == 3}
    expected = refine_clusters(x, labels, tight, backend="reference", **options, **encoding)
    assert 0 < (expected > labels.max() + (labels < 0).sum()).sum() < len(x), "else there is nothing to see"
    found = refine_clusters(x, labels, tight, backend="numba", **options, **encoding)
    assert torch.equal(found, expected)
    for graph in (
        jaccard_graph(x, radius=1.0, **encoding),
        jaccard_distance(x, 15, encoding["k2"], compat=number == 3),
    ):
        assert torch.equal(refine_clusters(None, labels, tight, graph=graph, **options), expected)
    assert torch.equal(
        refine_clusters(x, labels, tight, backend="numba", singletons=False, **options, **encoding),
        refine_clusters(x, labels, tight, backend="reference", singletons=False, **options, **encoding),
    )


def test_a_part_that_unites_two_whole_clusters(clustered):
    """Neither is split, but for each point of one the other's are a change."""
    x = clustered(60, 8)
    labels = torch.arange(60) % 2
    tight = torch.zeros_like(labels)
    expected = refine_clusters(x, labels, tight, k1=15, backend="reference")
    assert expected.tolist() == list(range(2, 62))
    assert torch.equal(refine_clusters(x, labels, tight, k1=15), expected)
    assert torch.equal(refine_clusters(x, labels, tight, k1=15, rule="mean_to_cluster"), labels)


def test_sums_are_the_same_bits_on_every_path(clustered):
    """The pairs of a cluster that are beyond eps, and those that share nothing, count with their distance."""
    x = clustered(150, 12, spread=0.9)
    generator = torch.Generator().manual_seed(0)
    labels, tight = (torch.randint(5, (150,), generator=generator) for _ in range(2))  # far pairs in every cluster
    encoding = {"k1": 15, "k2": 4, "knn": module.neighbours("test", x, 15, None), "compat": False}
    everything = torch.arange(150)
    graph = jaccard_graph(x, radius=1.0, **encoding)
    inside, changed = module._sums_on_graph(read_graph("test", graph), labels, tight)
    for found, expected in zip(module._numba(x, labels, tight, everything, **encoding), (inside, changed), strict=True):
        assert torch.equal(found, expected)
    dense = jaccard_distance(x, 15, 4, knn=encoding["knn"]).double().fill_diagonal_(0)
    assert (dense == 1).any()
    same, same_tight = labels[:, None] == labels, tight[:, None] == tight
    torch.testing.assert_close(inside.double() / 2**30, (dense * same).sum(1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(changed.double() / 2**30, (dense * (same != same_tight)).sum(1), rtol=1e-7, atol=1e-7)


def test_threads_do_not_matter(clustered):
    x = clustered(600, 16, spread=0.9)
    labels, tight = labellings(np.random.default_rng(0), x)
    usual = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(refine_clusters(x, labels, tight, k1=15))
    finally:
        torch.set_num_threads(usual)
    assert torch.equal(*found)


def test_what_nobody_splits_is_not_measured(monkeypatch, clustered):
    x = clustered(100, 8)
    labels = pseudo_labels(x, k1=15)
    monkeypatch.setattr(module, "_numba", None)
    monkeypatch.setattr(module, "_sums_on_graph", None)
    for rule in RULES:
        assert torch.equal(refine_clusters(x, labels, labels, rule=rule, k1=15), module.own_classes(labels))


@pytest.mark.parametrize("rule", [*RULES, "none"])
def test_nothing_to_refine(rule):
    x, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert refine_clusters(x, labels, labels, rule=rule).shape == (0,)
    one = torch.tensor([-1])
    with pytest.warns(UserWarning, match="clipped"):
        assert refine_clusters(torch.ones(1, 4), one, one, rule=rule).tolist() == [0]


def test_identical_features():
    """All at distance 0 and split in two: parts and cluster spread alike, and nobody moves."""
    x, labels = torch.ones(80, 4), torch.zeros(80, dtype=torch.int64)
    tight = (torch.arange(80) >= 30).long()
    near = refine_clusters(x, labels, tight, rule="mean_to_cluster", k1=80, k2=1)
    assert near.tolist() == [0] * 80


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [0.0] * 40}, TypeError, "refine_clusters: labels must hold integers"),
        ({"labels": [0] * 39}, ValueError, r"labels_tight must have one entry for each row of labels \(39\), got 40"),
        ({"labels_tight": [-2] * 40}, ValueError, r"labels_tight must lie in \[-1, 80\), got -2"),
        ({"rule": "paper"}, ValueError, "rule must be one of 'official', 'mean_to_cluster', 'none', got 'paper'"),
        ({"ratio": 0}, ValueError, "refine_clusters: ratio must be positive and finite, got 0"),
        ({"x": None}, ValueError, "x or graph must be given, and not both, got neither"),
        ({"graph": torch.zeros(40, 40)}, ValueError, "x or graph must be given, and not both, got both"),
        ({"x": torch.eye(41)}, ValueError, r"labels must have one entry for each row of x \(41\), got 40"),
        ({"x": torch.full((40, 2), torch.nan)}, ValueError, "x must be finite, got NaN or infinity in 40 of 40 rows"),
        ({"x": None, "graph": torch.zeros(41, 41)}, ValueError, r"one row for each label \(40\), got 41"),
        ({"x": None, "graph": torch.full((40, 40), 1.5)}, ValueError, r"graph must hold distances in \[0, 1\]"),
        ({"x": None, "graph": torch.full((40, 40), torch.nan)}, ValueError, r"graph must hold distances in \[0, 1\]"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'numba', 'triton', 'reference', got 'cuda'"),
    ],
)
def test_rejects(change, error, message):
    given = {"x": torch.eye(40), "labels": [0] * 40, "labels_tight": [0] * 40, **change}
    with pytest.raises(error, match=message):
        refine_clusters(**given)


@pytest.mark.parametrize("ratio", [1.1, 2.0])
def test_a_part_that_is_its_cluster_stays_at_any_ratio(ratio):
    x = torch.nn.functional.normalize(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = torch.arange(30) // 10
    tight = labels.clone()
    tight[:4] = 3  # the first cluster alone comes in parts
    found, expected = (
        refine_clusters(x, labels, tight, rule="mean_to_cluster", ratio=ratio, k1=6, k2=2, backend=backend)
        for backend in ("auto", "reference")
    )
    assert torch.equal(found, expected)
    assert torch.equal(found[10:], labels[10:])

# SPDX-License-Identifier: Apache-2.0
"""SpCL's criterion: published outputs, the N x N form, ties, the state between epochs."""

import numpy as np
import pytest
import torch

from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.reliable_clusters import reliable_clusters
from fastreid_u.reference import reliable_clusters as reference

FILES = [
    "spcl_criterion_n150_eps0.6_gap0.1",
    "spcl_criterion_n320_eps0.6_gap0.02",
    "spcl_criterion_n500_eps0.55_gap0.06",
]
both = pytest.mark.parametrize("run", [reliable_clusters, reference.reliable_clusters], ids=["op", "reference"])


@both
@pytest.mark.parametrize("name", FILES)
def test_golden(golden, name, run):
    file = golden(name)
    eps, gap = file.meta["params"]["eps"], file.meta["params"]["eps_gap"]
    threshold = None
    for epoch in (0, 1):
        stored = [file.tensor(f"dbscan_{kind}_epoch{epoch}") for kind in ("normal", "tight", "loose")]
        if f"dist_epoch{epoch}_val" in file:
            graph = torch.from_numpy(file.matrix(f"dist_epoch{epoch}"))
            assert torch.equal(dbscan(graph, [eps, eps - gap, eps + gap]), torch.stack(stored))

        found = run(*stored, threshold=threshold)
        np.testing.assert_array_equal(found.labels.numpy(), file[f"final_labels_epoch{epoch}"])
        np.testing.assert_allclose(1 - found.compactness.numpy(), file[f"R_comp_epoch{epoch}"], atol=1e-6, rtol=0)
        np.testing.assert_allclose(1 - found.independence.numpy(), file[f"R_indep_epoch{epoch}"], atol=1e-6, rtol=0)
        assert 1 - found.threshold == pytest.approx(float(file[f"indep_threshold_epoch{epoch}"]), abs=1e-6)
        threshold = found.threshold

        without = run(*stored, threshold=threshold, singletons=False)
        record = file.meta["params"]["epochs"][str(epoch)]
        assert without.labels.unique().tolist() == list(range(-1, record["final_clusters"]))
        assert (without.labels < 0).sum() == record["final_singletons"]


def labelling(rng, n, classes, noise=0.2):
    labels = rng.integers(0, classes, n)
    labels = np.unique(labels, return_inverse=True)[1]
    labels[rng.random(n) < noise] = -1
    return torch.from_numpy(labels)


@pytest.mark.parametrize("case", range(30))
def test_equals_the_n_by_n_form(case):
    rng = np.random.default_rng(case)
    n = [0, 1, 2, int(rng.integers(3, 80))][min(case, 3)]
    a = labelling(rng, n, rng.integers(1, 12))
    tight, loose = a.clone(), a.clone()
    for other in (tight, loose):
        moved = torch.from_numpy(rng.random(n) < 0.2)
        other[moved] = labelling(rng, n, 14)[moved]
    options = {"threshold": None if case % 3 else 0.5, "keep": [0.9, 0.5, 0.0, 1.0][case % 4]}
    for singletons in (True, False):
        found = reliable_clusters(a, tight, loose, singletons=singletons, **options)
        expected = reference.reliable_clusters(a, tight, loose, singletons=singletons, **options)
        assert found.threshold == expected.threshold
        for field in ("labels", "compactness", "independence"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field


def test_equal_quotients_of_different_counts_are_a_tie():
    """5 of the 15 of cluster 0 are a tight part (5 / 15), the other 10 join 15 of cluster 2 (10 / 30)."""
    a = torch.tensor([0] * 15 + [1] * 9 + [2] * 21)
    tight = torch.tensor([0] * 5 + [1] * 10 + [2] * 9 + [1] * 15 + [3] * 6)
    found = reliable_clusters(a, tight, a)
    assert found.compactness[0] == found.compactness[5] == 5 / 15 == 10 / 30
    assert (found.labels[:15] == 0).all()
    assert (found.labels[15:24] == 1).all()
    assert (found.labels[24:39] == 2).all()
    assert found.labels[39:].tolist() == list(range(3, 9))


def test_one_point_more_is_no_tie():
    a = torch.zeros(1001, dtype=torch.int64)
    tight = (torch.arange(1001) >= 500).long()
    found = reliable_clusters(a, tight, a)
    assert (found.labels == 0).tolist() == [False] * 500 + [True] * 501


def test_threshold_is_that_of_the_first_epoch():
    rng = np.random.default_rng(0)
    a, loose = labelling(rng, 200, 10), labelling(rng, 200, 10)
    first = reliable_clusters(a, a, loose)
    assert 0 < first.threshold < 1
    same = reliable_clusters(a, a, loose, threshold=first.threshold)
    assert torch.equal(same.labels, first.labels)
    assert reliable_clusters(a, a, a, threshold=first.threshold).threshold == first.threshold
    stricter = reliable_clusters(a, a, loose, threshold=1.0, singletons=False)
    assert (stricter.labels == -1).all()


@both
@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_cluster_in_the_first_epoch_leaves_the_threshold_open(n, run):
    noise = torch.full((n,), -1)
    found = run(noise, noise, noise)
    assert found.threshold is None
    assert found.labels.tolist() == list(range(n))
    assert run(noise, noise, noise, singletons=False).labels.tolist() == [-1] * n


def test_takes_arrays_and_gaps_in_the_numbering():
    labels = np.array([3, 3, 7, 7, -1], np.int32)
    found = reliable_clusters(labels, labels, labels)
    assert found.labels.tolist() == [3, 3, 7, 7, 8]
    assert found.labels.dtype == torch.int64
    assert reliable_clusters(labels, labels, labels, singletons=False).labels.tolist() == [0, 0, 1, 1, -1]


def test_large_clusterings_need_no_square():
    """N x N booleans of 300,000 labels would be 90 GB."""
    rng = np.random.default_rng(0)
    a = labelling(rng, 300_000, 20_000)
    tight = torch.where(torch.from_numpy(rng.random(len(a)) < 0.1), -1, a)
    found = reliable_clusters(a, tight, a)
    counts = (a >= 0).sum(), (found.labels < 20_000).sum()
    assert 0.5 < counts[1] / counts[0] < 0.95


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([0.5, 1.0], {}, TypeError, "reliable_clusters: labels must hold integers, got torch.float32"),
        ([[0, 1]], {}, ValueError, "reliable_clusters: labels must be 1-D, got shape"),
        ([0, -2], {}, ValueError, r"reliable_clusters: labels must lie in \[-1, 4\), got -2"),
        ([0, 2**40], {}, ValueError, r"reliable_clusters: labels must lie in \[-1, 4\), got 1099511627776"),
        ([0, 1, 1], {}, ValueError, r"labels_tight must have one entry for each row of labels \(3\), got 2"),
        ([0, 1], {"threshold": 1.5}, ValueError, r"reliable_clusters: threshold must lie in \[0, 1\], got 1.5"),
        ([0, 1], {"keep": -0.1}, ValueError, r"reliable_clusters: keep must lie in \[0, 1\], got -0.1"),
        ("ab", {}, TypeError, "reliable_clusters: labels must be a tensor or an array"),
    ],
)
def test_rejects(labels, options, error, message):
    with pytest.raises(error, match=message):
        reliable_clusters(labels, [0, 1], [0, 1], **options)

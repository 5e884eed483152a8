# SPDX-License-Identifier: Apache-2.0
"""Features to labels, end to end."""

import numpy as np
import pytest
import torch

from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_graph
from fastreid_u.ops.pseudo_labels import pseudo_labels

EPS = ["0.40", "0.45", "0.50", "0.55", "0.60", "0.65", "0.70"]


@pytest.mark.parametrize("name", ["jaccard_n64_d32", "jaccard_n257_d128", "jaccard_n600_d256"])
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 6), (30, 1), (10, 3)])
def test_golden(golden, name, k1, k2):
    file = golden(name)
    record = file.meta["params"]["dbscan"][f"k{k1}_{k2}"]
    stable = [eps for eps in EPS if record[eps]["labels_stable_under_eps_pm_4e_6"]]
    assert len(stable) >= 3, "the file should be able to test something"
    for eps in stable:
        labels = pseudo_labels(file.tensor("features"), eps=float(eps), k1=k1, k2=k2)
        np.testing.assert_array_equal(labels.numpy(), file[f"labels_k{k1}_{k2}_eps{eps}"], err_msg=f"eps {eps}")


def test_golden_one_tight_cluster(golden):
    file = golden("jaccard_edge_tight")
    outcomes = [name for name in file if name.startswith("labels_")]
    assert len(outcomes) == 4
    for name in outcomes:  # labels_k30_6_eps0.60
        counts, eps = name.removeprefix("labels_k").split("_eps")
        k1, k2 = map(int, counts.split("_"))
        labels = pseudo_labels(file.tensor("features"), eps=float(eps), k1=k1, k2=k2)
        np.testing.assert_array_equal(labels.numpy(), file[name], err_msg=name)


@pytest.mark.parametrize("eps", [0.3, 0.5, 0.6, 0.75])
def test_is_its_parts_put_together(clustered, eps):
    x = clustered(180, 24, spread=0.9)
    labels = pseudo_labels(x, eps=eps, min_samples=3, k1=15, k2=4)
    assert torch.equal(labels, dbscan(jaccard_graph(x, k1=15, k2=4), eps, 3))


def test_finds_separated_identities():
    centre = torch.eye(6)
    x = centre.repeat_interleave(20, 0) + 0.02 * torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    labels = pseudo_labels(x, k1=15)
    assert torch.equal(labels, torch.arange(6).repeat_interleave(20))


def test_all_noise():
    x = torch.randn(60, 400, generator=torch.Generator().manual_seed(1))
    assert (pseudo_labels(x, eps=0.05, k1=10) == -1).all()


def test_zero_rows_form_one_cluster(clustered):
    x = clustered(90, 16)
    x[::9] = 0
    labels = pseudo_labels(x, k1=10, k2=1)
    assert len(set(labels[::9].tolist())) == 1
    assert labels[0] >= 0


def test_collapsed_features_are_one_cluster():
    assert (pseudo_labels(torch.ones(70, 8)) == 0).all()


def test_shape_type_and_small_inputs(clustered):
    labels = pseudo_labels(clustered(33, 8).numpy())
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (33,))
    assert tuple(pseudo_labels(torch.zeros(0, 8)).shape) == (0,)
    with pytest.warns(UserWarning, match="pseudo_labels: k1=30, k2=6 is more than the 1 rows") as caught:
        assert pseudo_labels(torch.ones(1, 8)).tolist() == [-1]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, r"pseudo_labels: eps must lie in \(0, 1\), got 0"),
        ({"eps": 1.0}, r"pseudo_labels: eps must lie in \(0, 1\), got 1.0"),
        ({"min_samples": 0}, "pseudo_labels: min_samples must be at least 1, got 0"),
        ({"k2": 31}, r"pseudo_labels: k2 must be at most k1 \(30\), got 31"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        pseudo_labels(torch.eye(40), **options)


def test_rejects_nan():
    x = torch.ones(40, 3)
    x[12:15, 0] = torch.nan
    with pytest.raises(ValueError, match=r"pseudo_labels: x must be finite, .* 3 of 40 rows \(first: row 12\)"):
        pseudo_labels(x)

# SPDX-License-Identifier: Apache-2.0
"""The CPU's Jaccard distance: exact at the threshold, and a prefix filter that lets every near pair pass."""

import numpy as np
import pytest
import torch

from fastreid_u.cpu.jaccard import build_index, least_overlap, to_distance
from fastreid_u.cpu.rows import Rows, bits
from fastreid_u.ops.dbscan import dbscan
from fastreid_u.ops.jaccard import jaccard_distance
from fastreid_u.ops.knn import knn
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.reference import jaccard as reference_jaccard


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

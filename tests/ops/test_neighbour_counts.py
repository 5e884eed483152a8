# SPDX-License-Identifier: Apache-2.0
"""k1 and k2 together: a k2 that a list of k1 rows cannot hold is clipped, with a warning if the caller gave it."""

import types
import warnings

import pytest
import torch

from fastreid_u import jaccard_distance, jaccard_graph, k_reciprocal_encoding, pseudo_labels, suggest_eps
from fastreid_u.config import Config
from fastreid_u.images import Images
from fastreid_u.labels.dbscan import DBSCANLabels
from fastreid_u.labels.refined import RefinedLabels
from fastreid_u.ops.refine_clusters import refine_clusters
from fastreid_u.reference import jaccard as reference_jaccard
from fastreid_u.reference import k_reciprocal as reference_encoding


def split(x, **counts):
    label = torch.zeros(len(x), dtype=torch.int64)
    return refine_clusters(x, label, torch.arange(len(x)) % 2, **counts)


OPS = {
    "jaccard_graph": lambda x, **counts: jaccard_graph(x, **counts).to_dense(),
    "jaccard_distance": jaccard_distance,
    "k_reciprocal_encoding": lambda x, **counts: k_reciprocal_encoding(x, **counts).to_dense(),
    "pseudo_labels": pseudo_labels,
    "suggest_eps": lambda x, **counts: suggest_eps(x, **counts).core_distance,
    "refine_clusters": split,
}


@pytest.mark.filterwarnings("ignore:suggest_eps. the knee is not reliable:UserWarning")
@pytest.mark.parametrize("op", OPS)
def test_k2_beyond_k1_is_clipped_with_one_warning(op, clustered):
    x = clustered(40, 8)
    with pytest.warns(UserWarning, match=rf"{op}: k2=9 is more than the k1=5 rows of a list, clipped to it") as caught:
        found = OPS[op](x, k1=5, k2=9)
    clipped = [warning for warning in caught if "clipped" in str(warning.message)]
    assert [warning.filename for warning in clipped] == [__file__]
    assert torch.equal(found, OPS[op](x, k1=5, k2=5))


@pytest.mark.parametrize("op", OPS)
def test_k2_that_was_not_given_follows_a_small_k1(op, clustered):
    x = clustered(40, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "suggest_eps: the knee is not reliable")
        assert torch.equal(OPS[op](x, k1=5), OPS[op](x, k1=5, k2=5))
        assert torch.equal(OPS[op](x, k1=12), OPS[op](x, k1=12, k2=6))


def test_more_than_there_are_rows_is_one_warning():
    with pytest.warns(UserWarning, match="k1=8, k2=9 is more than the 4 rows there are, clipped to them") as caught:
        jaccard_distance(torch.eye(4), 8, 9)
    assert len(caught) == 1


def test_both_forms_take_k1_and_k2_by_position(clustered):
    x = clustered(40, 8)
    for form in (jaccard_graph, reference_jaccard.jaccard_graph):
        assert torch.equal(form(x, 10, 3).to_dense(), form(x, k1=10, k2=3).to_dense())
    assert torch.equal(jaccard_distance(x, 10, 3), jaccard_distance(x, k1=10, k2=3))


def encoded(*given):
    return reference_encoding.k_reciprocal_encoding(*given).to_dense()


def test_references_have_the_same_counts(clustered):
    x = clustered(40, 8)
    for op in (reference_jaccard.jaccard_distance, encoded):
        assert torch.equal(op(x, 5), op(x, 5, 5))
        assert torch.equal(op(x, 5, 9), op(x, 5, 5))


@pytest.mark.parametrize("labels", [DBSCANLabels, RefinedLabels])
def test_a_recipe_with_small_lists_makes_labels(labels, clustered):
    """``train --k1 5`` leaves k2 at 6."""
    config = Config(k1=5)
    extra = {"eps_gap": 0.02, "refinement": "official", "ratio": 0.5}
    config = types.SimpleNamespace(
        **{name: getattr(config, name) for name in ("k1", "k2", "eps", "min_samples")}, **extra
    )
    made = labels(config, Images(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = made.cluster(clustered(40, 8), epoch=0)
    assert found.shape == (40,)
    assert "k1 5, k2 5" in made.describe()

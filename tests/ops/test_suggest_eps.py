# SPDX-License-Identifier: Apache-2.0
"""The sweep is DBSCAN's, the curve says who is core, the knee separates what is separate."""

import pytest
import torch

from fastreid_u.ops.jaccard import jaccard_distance
from fastreid_u.ops.pseudo_labels import pseudo_labels
from fastreid_u.ops.suggest_eps import knee, suggest_eps

pytestmark = pytest.mark.filterwarnings("ignore:suggest_eps. the knee is not reliable:UserWarning")


def few_images_a_person():
    """Unit rows of 120 people with 2 to 10 images each; most have a nearest row of the same person."""
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(2, 11, (120,), generator=generator)
    person = torch.arange(120).repeat_interleave(count)
    rows = torch.randn(120, 12, generator=generator)[person] + 0.8 * torch.randn(len(person), 12, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1)


def test_a_knee_past_the_collapse_is_warned_of_and_seen_in_the_sweep():
    with pytest.warns(UserWarning, match=r"suggest_eps: the knee is not reliable .* eps 0\.5"):
        found = suggest_eps(few_images_a_person())
    share = dict(zip(found.grid, found.largest, strict=True))
    assert share[0.5] < 0.2
    assert max(most for eps, most in share.items() if eps <= found.eps) > 0.5
    assert "not reliable" in str(found).splitlines()[-1]


def test_sweep_is_what_pseudo_labels_finds(clustered):
    x = clustered(300, 24, spread=0.9)
    found = suggest_eps(x, k1=20, min_samples=3)
    assert found.grid[0] == 0.3
    assert found.grid[-1] == 0.8
    for eps, clusters, unclustered, largest in zip(
        found.grid, found.clusters, found.unclustered, found.largest, strict=True
    ):
        labels = pseudo_labels(x, eps=eps, k1=20, min_samples=3)
        assert clusters == labels.max() + 1
        assert unclustered == pytest.approx((labels < 0).double().mean().item())
        assert largest == pytest.approx(labels[labels >= 0].bincount(minlength=1).max().item() / 300)
    assert len(set(found.clusters)) > 3, "else the sweep shows nothing"


@pytest.mark.parametrize("min_samples", [1, 2, 4, 9])
def test_core_distance_is_the_radius_at_which_a_point_becomes_core(clustered, min_samples):
    x = clustered(160, 12)
    found = suggest_eps(x, min_samples=min_samples)
    dense = jaccard_distance(x).fill_diagonal_(0).sort(dim=1).values[:, min_samples - 1]
    expected = torch.where(dense <= 0.8, dense, torch.inf).sort().values
    assert torch.equal(found.core_distance, expected)
    assert found.core_distance.isinf().any() == (dense > 0.8).any()


def test_knee_of_a_flat_and_then_steep_curve():
    curve = torch.cat([torch.linspace(0.10, 0.20, 80), torch.linspace(0.25, 0.79, 20)])
    assert knee(curve, 0.8) == pytest.approx(0.20, abs=0.01)
    assert knee(torch.cat([curve[:80], torch.full((20,), torch.inf)]), 0.8) == pytest.approx(0.20, abs=0.01)


def test_knee_separates_identities():
    generator = torch.Generator().manual_seed(0)
    identity = torch.arange(8).repeat_interleave(20)
    x = torch.eye(8)[identity] + 0.05 * torch.randn(160, 8, generator=generator)
    known = torch.arange(160) % 16 > 0
    x[~known] = torch.randn(10, 8, generator=generator)
    found = suggest_eps(x, k1=15)
    labels = pseudo_labels(x, eps=found.eps, k1=15)
    together = ((labels[:, None] == labels) & (labels >= 0))[known][:, known]
    assert (identity[known, None] == identity[known])[together].all()
    assert (labels[known] >= 0).float().mean() > 0.8
    assert "clusters" in str(found)
    assert str(found).count("\n") == len(found.grid) + 1


def test_identical_features():
    found = suggest_eps(torch.ones(50, 4))
    assert set(found.clusters) == {1}
    assert found.eps == 0.3, "the knee is below the grid"


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(0, 3), {}, "suggest_eps: x must have at least one row"),
        (torch.eye(40), {"grid": []}, "suggest_eps: grid must hold at least one number"),
        (torch.eye(40), {"grid": [0.5, 0.4]}, "suggest_eps: grid must hold ascending radii, got"),
        (torch.eye(40), {"grid": [0.5, 1.0]}, r"suggest_eps: grid must lie in \(0, 1\), got 1.0"),
        (torch.eye(40), {"min_samples": 0}, "suggest_eps: min_samples must be at least 1, got 0"),
    ],
)
def test_rejects(x, options, message):
    with pytest.raises(ValueError, match=message):
        suggest_eps(x, **options)

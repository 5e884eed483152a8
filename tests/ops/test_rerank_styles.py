# SPDX-License-Identifier: Apache-2.0
"""The three published rules of re-ranking, each against a plain restatement and stored numbers, if any."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.jaccard import jaccard_distance
from fastreid_u.ops.rerank import STYLES, rerank

backends = pytest.mark.parametrize("backend", ["numba", "reference"])


def pairwise(x, distance):
    x = x.double()
    if distance == "cosine":
        return (1 - F.normalize(x) @ F.normalize(x).T).numpy()
    whole = (x[:, None] - x).square().sum(-1)
    return (whole if distance == "sqeuclidean" else whole.sqrt()).numpy()


def encoded(weights, ranking, full, half, k2):
    """Rows of the soft neighbourhoods, by sets; ``weights`` are exp of minus a distance."""
    n = len(weights)

    def mutual(i, k):
        return {j for j in ranking[i, :k] if i in ranking[j, :k]}

    v = np.zeros((n, n))
    for i in range(n):
        core = mutual(i, full)
        members = set(core)
        for q in core:
            candidate = mutual(q, half)
            if 3 * len(candidate & core) > 2 * len(candidate):
                members |= candidate
        members = sorted(members)
        v[i, members] = weights[i, members] / weights[i, members].sum()
    return v if k2 == 1 else v[ranking[:, :k2]].mean(1)


def restated(style, x, queries, k1, k2, weight, distance):
    """Dense float64, as each code base does it."""
    given, half = pairwise(x, distance), int(np.around(k1 / 2)) + 1
    if style == "clustering":  # of the features, or of their directions
        squared = pairwise(F.normalize(x) if distance == "cosine" else x, "sqeuclidean")
        v = encoded(np.exp(-squared), squared.argsort(1, kind="stable"), k1, half, k2)
        original = given
    else:
        original = given**2 if style == "openreid" else given
        original = (original / original.max(0)).T
        v = encoded(np.exp(-original), original.argsort(1, kind="stable"), k1 + 1, half, k2)
    overlap = np.minimum(v[:queries, None], v[None, queries:]).sum(-1)
    return (1 - weight) * (1 - overlap / (2 - overlap)) + weight * original[:queries, queries:]


@backends
@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("style", STYLES)
def test_each_style_is_what_its_code_bases_do(clustered, style, distance, backend):
    x = clustered(44, 10, number=3) * torch.linspace(0.8, 1.3, 44)[:, None]
    for k1, k2, weight in ((9, 3, 0.3), (8, 1, 0.0), (15, 5, 1.0)):
        expected = restated(style, x, 13, k1, k2, weight, distance)
        given = dict(style=style, distance=distance, backend=backend)
        found = rerank(x[:13], x[13:], k1, k2, weight, **given)
        np.testing.assert_allclose(found.numpy(), expected, atol=4e-6)
        near, index = rerank(x[:13], x[13:], k1, k2, weight, top=7, **given)
        assert torch.equal(near, found.gather(1, index))
        assert torch.equal(index, found.sort(dim=1, stable=True).indices[:, :7])


def test_the_usual_style_is_that_of_open_reid(clustered):
    x = clustered(60, 8)
    found = {style: rerank(x[:20], x[20:], style=style) for style in STYLES}
    assert torch.equal(rerank(x[:20], x[20:]), found["openreid"])
    assert (found["openreid"] - found["zhong"]).abs().max() > 0.01
    assert (found["openreid"] - found["clustering"]).abs().max() > 0.1


@backends
@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (10, 3)])
def test_golden_of_the_clustering_style(golden, k1, k2, backend):
    file = golden("rerank_fastreid_evaluator_q30_g150")
    given = dict(style="clustering", distance="cosine", backend=backend)
    found = rerank(file.tensor("query"), file.tensor("gallery"), k1, k2, **given)
    torch.testing.assert_close(found, file.tensor(f"final_evaluator_k{k1}_{k2}_l0.3"), atol=2e-6, rtol=0)


@backends
def test_golden_of_zhong_s_style(golden, backend):
    """CAP's and ICE's Jaccard distance is that of features squared once, with nothing mixed in."""
    file = golden("jaccard_variants_n180")
    x, published = file.tensor("features"), torch.from_numpy(file.matrix("dist_cap_torch_k20_6"))
    found = rerank(x[:70], x[70:], lambda_value=0, style="zhong", backend=backend)
    torch.testing.assert_close(found, published[:70, 70:], atol=2e-6, rtol=0)


@backends
def test_zhong_s_style_takes_ready_distances_as_they_are(clustered, backend):
    """Also those that rounding has put a little below zero."""
    x = F.normalize(clustered(50, 8))
    whole = torch.from_numpy(pairwise(x, "cosine")).float().fill_diagonal_(-1e-7)
    matrices = whole[:20, 20:], whole[:20, :20], whole[20:, 20:]
    found = rerank(None, None, 8, 3, style="zhong", distmats=matrices, backend=backend)
    expected = rerank(x[:20], x[20:], 8, 3, style="zhong", distance="cosine", backend="reference")
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


def test_the_clustering_style_mixes_jaccard_distance(clustered):
    x = clustered(70, 6)
    x[30:40] = x[40:50]
    for k1, k2 in ((12, 4), (1, 1), (70, 70)):
        found = rerank(x[:20], x[20:], k1, k2, 0, style="clustering")
        torch.testing.assert_close(found, jaccard_distance(x, k1, k2)[:20, 20:], atol=1e-6, rtol=0)
    with pytest.warns(UserWarning, match="rerank: k1=90, k2=9 is more than the 70 images there are, clipped"):
        rerank(x[:20], x[20:], 90, 9, style="clustering")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "fastreid"}, "style must be one of 'openreid', 'zhong', 'clustering', got 'fastreid'"),
        ({"k1": 3, "k2": 4}, r"k2 must be at most k1 \(3\) with style 'clustering', got 4"),
        ({"distmats": (torch.ones(2, 3), torch.ones(2, 2), torch.ones(3, 3))}, "distmats must be left out with style"),
    ],
)
def test_rejects(options, message):
    given = {"query": torch.ones(2, 4), "gallery": torch.ones(3, 4), "k1": 2, "k2": 1, "style": "clustering"}
    with pytest.raises(ValueError, match=f"rerank: {message}"):
        rerank(**{**given, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
def test_gpu_gives_what_a_cpu_gives(clustered, style):
    x = clustered(2000, 64) * torch.linspace(0.8, 1.2, 2000)[:, None]
    for distance in ("sqeuclidean", "cosine"):
        expected = rerank(x[:300], x[300:], style=style, distance=distance)
        found = rerank(x[:300].cuda(), x[300:].cuda(), style=style, distance=distance, backend="triton")
        torch.testing.assert_close(found.cpu(), expected, atol=2e-6, rtol=0)


@backends
@pytest.mark.parametrize("style", STYLES)
def test_torch_s_default_device_does_not_matter(clustered, style, backend):
    """ "meta" stands for a device that is not there."""
    x = clustered(40, 6)
    expected = rerank(x[:10], x[10:], 8, 3, style=style, top=5, backend=backend)
    torch.set_default_device("meta")
    try:
        found = rerank(x[:10], x[10:], 8, 3, style=style, top=5, backend=backend)
        if style != "clustering":
            parts = torch.cdist(x, x)[:10, 10:], torch.cdist(x[:10], x[:10]), torch.cdist(x[10:], x[10:])
            assert not rerank(None, None, 8, 3, style=style, distmats=parts, backend=backend).is_meta
    finally:
        torch.set_default_device(None)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("exponent", [-60, -35, 30, 60])
def test_the_reference_ranks_features_of_any_length_as_numba_does(clustered, exponent, style, distance):
    """Fourth powers of long rows were infinite, those of short ones 0: NaN, or all neighbours alike."""
    x = clustered(40, 6)
    x[5] *= 1.5
    long = x * 2.0**exponent
    found = rerank(long[:12], long[12:], 8, 3, style=style, distance=distance, backend="reference")
    expected = rerank(long[:12], long[12:], 8, 3, style=style, distance=distance, backend="numba")
    torch.testing.assert_close(found, expected, atol=4e-6, rtol=1e-5)
    if style != "clustering" and (distance != "cosine" or exponent > -40):  # shorter rows have no direction
        usual = rerank(x[:12], x[12:], 8, 3, style=style, distance=distance, backend="reference")
        torch.testing.assert_close(found, usual, atol=4e-6, rtol=0)


@pytest.mark.parametrize("style", ["openreid", "zhong"])
@pytest.mark.parametrize("turned", [0, 1, 2])
def test_distances_far_below_zero_are_refused(clustered, style, turned):
    """Similarities, or distances turned around."""
    x = F.normalize(clustered(30, 8))
    whole = torch.cdist(x, x)
    parts = [whole[:10, 10:], whole[:10, :10], whole[10:, 10:]]
    parts[turned] = -parts[turned]
    message = rf"rerank: {('q_g', 'q_q', 'g_g')[turned]} must hold no distance below 0 \(or -0.0\d+, rounded\), got -1"
    with pytest.raises(ValueError, match=message):
        rerank(None, None, 8, 3, style=style, distmats=parts)


def test_features_and_distances_at_once_are_refused():
    q, g, parts = torch.ones(2, 4), torch.ones(3, 4), (torch.ones(2, 3), torch.ones(2, 2), torch.ones(3, 3))
    for given in ((q, g), (q, None), (None, g)):
        with pytest.raises(ValueError, match="rerank: query and gallery must be None with distmats, got features as w"):
            rerank(*given, 2, 1, distmats=parts)


def test_float64_distances_beyond_float32_are_refused_as_such():
    """They were called infinite."""
    huge, zeros = torch.full((2, 2), 1e200, dtype=torch.float64), torch.zeros(2, 2)
    for style, rule in (("openreid", r"be below 2\*\*63, as"), ("zhong", "hold distances that float32 can hold")):
        with pytest.raises(ValueError, match=rf"rerank: q_g must {rule}.*, got 1e\+200"):
            rerank(None, None, 2, 2, style=style, distmats=(huge, zeros, zeros))

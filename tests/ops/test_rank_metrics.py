# SPDX-License-Identifier: Apache-2.0
"""mAP, CMC and mINP: published numbers, scikit-learn, and queries that cannot be scored."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from fastreid_u.ops.rank_metrics import rank_metrics
from fastreid_u.reference import rank_metrics as reference

FILES = ["eval_all_valid_q40_g160", "eval_no_match_q60_g220", "eval_small_gallery_q25_g41", "eval_ties_q50_g180"]


def score(file, **options):
    ids = [file.tensor(name) for name in ("q_ids", "g_ids", "q_cams", "g_cams")]
    return rank_metrics(None, None, *ids, distmat=file.tensor("distmat"), **options)


def stable(file, name):
    """The variant of an array that does not depend on how a sort orders equal distances."""
    return file.get(f"{name}_stable_sort", file.get(name))


@pytest.mark.parametrize("name", FILES)
def test_golden_first_match_cmc(golden, name):
    file = golden(name)
    np.testing.assert_allclose(score(file).cmc.numpy(), stable(file, "cc_cmc"), atol=1e-9)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("formula", "published"), [("sklearn", "cc_mAP"), ("trapezoid", "cap_mapcmc_mAP")])
def test_golden_mean_average_precision(golden, name, formula, published):
    file = golden(name)
    assert score(file, ap=formula).mAP == pytest.approx(float(stable(file, published)), abs=1e-9)


@pytest.mark.parametrize("name", FILES)
def test_golden_per_query_values(golden, name):
    file = golden(name)
    found = score(file)
    for source, tolerance in (("fastreid_py", 1e-6), ("fastreid_cy", 2e-6)):
        if f"{source}_AP" in file:
            np.testing.assert_allclose(found.ap.numpy(), stable(file, f"{source}_AP"), atol=tolerance)
            np.testing.assert_allclose(found.inp.numpy(), stable(file, f"{source}_INP"), atol=tolerance)
    assert found.mAP == pytest.approx(float(stable(file, "torchreid_cy_mAP")), abs=2e-6)
    assert found.mINP == pytest.approx(float(stable(file, "fastreid_cy_INP").mean()), abs=2e-6)
    np.testing.assert_array_equal(found.valid.numpy(), file["query_has_match"])
    assert found.num_valid_queries == file["query_has_match"].sum()
    assert found.num_queries == len(file["q_ids"])


def test_golden_short_kept_list(golden):
    file = golden("eval_short_kept_list")
    found = score(file, max_rank=50)
    np.testing.assert_allclose(found.cmc.numpy(), file["cc_cmc50"], atol=1e-9)
    assert score(file, ap="sklearn").mAP == pytest.approx(float(file["cc_mAP"]), abs=1e-9)
    np.testing.assert_allclose(found.ap.numpy(), file["fastreid_cy_AP"], atol=2e-6)
    np.testing.assert_allclose(found.inp.numpy(), file["fastreid_cy_INP"], atol=2e-6)


@pytest.mark.parametrize("name", FILES[:3])
def test_features_rank_as_the_stored_distances(golden, name):
    file = golden(name)
    ids = [file.tensor(key) for key in ("q_ids", "g_ids", "q_cams", "g_cams")]
    found = rank_metrics(file.tensor("query"), file.tensor("gallery"), *ids)
    expected = score(file)
    assert torch.equal(found.ap, expected.ap)
    assert torch.equal(found.cmc, expected.cmc)


@pytest.mark.parametrize("coarse", [False, True])
def test_sklearn_formula_is_scikit_learns(coarse):
    rng = np.random.default_rng(0)
    distmat = rng.random((20, 70)).astype(np.float32)
    if coarse:
        distmat = np.round(distmat * 6) / 6
    q_pids, g_pids = rng.integers(0, 8, 20), rng.integers(0, 8, 70)
    found = rank_metrics(None, None, q_pids, g_pids, distmat=distmat, ap="sklearn")
    expected = [average_precision_score(g_pids == pid, -row) for pid, row in zip(q_pids, distmat, strict=True)]
    np.testing.assert_allclose(found.ap.numpy(), expected, atol=1e-12)


def test_worked_by_hand():
    # the list of the query: wrong, right, (same camera: removed), wrong, right
    found = rank_metrics(
        None,
        None,
        [1],
        [2, 1, 1, 3, 1],
        [0],
        [1, 1, 0, 1, 2],
        distmat=torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]]),
        max_rank=5,
    )
    assert found.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found.mINP == pytest.approx(2 / 4)
    assert found.cmc.tolist() == [0, 1, 1, 1, 1]
    assert (found.top(1), found.top(2)) == (0, 1)


@pytest.mark.parametrize(("max_rank", "last"), [(2, 0), (3, 1), (4, 1)])
def test_first_match_at_the_last_rank_counts(max_rank, last):
    found = rank_metrics(None, None, [1], [0, 0, 1], distmat=torch.tensor([[0.1, 0.2, 0.3]]), max_rank=max_rank)
    assert len(found.cmc) == max_rank
    assert found.cmc[-1] == last


def test_equal_distances_rank_by_gallery_index():
    late = rank_metrics(None, None, [1], [0, 0, 1], distmat=torch.zeros(1, 3))
    early = rank_metrics(None, None, [1], [1, 0, 0], distmat=torch.zeros(1, 3))
    assert (late.mAP, early.mAP) == (pytest.approx(1 / 3), 1)
    block = rank_metrics(None, None, [1], [0, 0, 1], distmat=torch.zeros(1, 3), ap="sklearn")
    assert block.mAP == pytest.approx(1 / 3)


def test_without_cameras_nothing_is_removed():
    ids, distmat = ([1], [1, 2]), torch.tensor([[0.0, 1.0]])
    assert rank_metrics(None, None, *ids, distmat=distmat).mAP == 1
    assert rank_metrics(None, None, *ids, [0], [1, 0], distmat=distmat).mAP == 1


def test_a_set_against_itself_by_unique_cameras(clustered):
    x = clustered(60, 8)
    pids = torch.arange(60) % 12
    found = rank_metrics(x, x, pids, pids, range(60), range(60))
    sq_dist = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)
    nearest = pids[sq_dist.argmin(1)] == pids
    assert found.num_valid_queries == 60
    assert found.top(1) == pytest.approx(nearest.double().mean().item())


@pytest.mark.parametrize(
    ("g_pids", "g_camids", "why"),
    [([7, 8], [1, 1], "no identity of the query is in the gallery"), ([1, 8], [0, 0], "shares its query's camera")],
)
def test_nobody_to_score_warns_and_gives_nan(g_pids, g_camids, why):
    with pytest.warns(UserWarning, match=why):
        found = rank_metrics(None, None, [1], g_pids, [0], g_camids, distmat=torch.rand(1, 2))
    assert math.isnan(found.mAP)
    assert math.isnan(found.mINP)
    assert found.cmc.isnan().all()
    assert (found.num_valid_queries, found.num_queries, len(found.ap)) == (0, 1, 0)
    assert "0 of 1 queries" in str(found)


@pytest.mark.parametrize(("q", "g"), [(0, 5), (3, 0), (0, 0)])
def test_empty_sides(q, g):
    why = "there are no queries" if q == 0 else "the gallery is empty"
    with pytest.warns(UserWarning, match=f"none of {q} queries can be scored, the metrics are NaN: {why}"):
        found = rank_metrics(torch.zeros(q, 4), torch.zeros(g, 4), [1] * q, [1] * g)
    assert (found.num_queries, found.num_valid_queries) == (q, 0)


def test_blocks_of_queries_do_not_matter(golden, monkeypatch):
    file = golden(FILES[0])
    arguments = [file.tensor(key) for key in ("query", "gallery", "q_ids", "g_ids", "q_cams", "g_cams")]
    expected = rank_metrics(*arguments)
    monkeypatch.setattr(reference, "_BLOCK_ENTRIES", 500)
    assert torch.equal(rank_metrics(*arguments).ap, expected.ap)


def test_result_is_frozen_and_prints(golden):
    found = score(golden(FILES[0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mAP = 1.0
    assert str(found).startswith("mAP 23.95% · top-1 22.50% · top-5 67.50% · top-10 85.00% · mINP 14.13%")


def test_no_warning_when_all_is_well(golden):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(golden(FILES[1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ap": "voc"}, ValueError, "ap must be one of 'rank', 'sklearn', 'trapezoid', got 'voc'"),
        ({"max_rank": 0}, ValueError, "max_rank must be at least 1, got 0"),
        ({"q_pids": [1, 2, 3]}, ValueError, "q_pids must have 2 entries, got 3"),
        ({"g_pids": torch.ones(3)}, TypeError, "g_pids must hold integers, got torch.float32"),
        ({"q_camids": [0, 0]}, ValueError, "q_camids and g_camids must be given together, got no g_camids"),
        ({"distmat": None}, ValueError, "query and gallery must be given without distmat, got None"),
        ({"distmat": torch.full((2, 3), torch.nan)}, ValueError, "distmat must be finite, .* 2 of 2 rows"),
        ({"distmat": torch.ones(3)}, ValueError, r"distmat must be 2-D, got shape \(3,\)"),
    ],
)
def test_rejects(change, error, message):
    arguments = {"query": None, "gallery": None, "q_pids": [1, 2], "g_pids": [1, 2, 1], "distmat": torch.rand(2, 3)}
    with pytest.raises(error, match=f"rank_metrics: {message}"):
        rank_metrics(**{**arguments, **change})


@pytest.mark.parametrize("width", [3, 256, 2048])
def test_copies_tie_and_rank_by_index(width):
    """The rounding of a product of matrices must not order what is equal."""
    generator = torch.Generator().manual_seed(width)
    x = torch.nn.functional.normalize(torch.randn(5, width, generator=generator), dim=1)
    copies = x[:1].repeat(27, 1)
    assert rank_metrics(x[:1].repeat(4, 1), copies, [1] * 4, [1] + [0] * 26).mAP == 1.0
    gallery = x[torch.randint(5, (40,), generator=generator)]
    exact = (x[:, None].double() - gallery.double()).square().sum(dim=2).float()
    pids = torch.randint(3, (40,), generator=generator)
    found, wanted = (
        rank_metrics(*features, [0, 1, 2, 0, 1], pids, distmat=distmat)
        for features, distmat in (((x, gallery), None), ((None, None), exact))
    )
    assert torch.equal(found.ap, wanted.ap)
    assert torch.equal(found.cmc, wanted.cmc)


def test_unsigned_identities_without_a_match_are_warned_of():
    with pytest.warns(UserWarning, match="no identity of the query is in the gallery"):
        rank_metrics(torch.eye(3), torch.eye(3), np.zeros(3, np.uint16), np.ones(3, np.int64))


def test_an_image_in_query_and_gallery_is_no_match_of_its_own(clustered):
    """Without cameras; also an image whose two entries contradict each other in identity or camera."""
    x = clustered(30, 8)
    pids = torch.arange(30) % 6
    found = rank_metrics(x[:10], x, pids[:10], pids, q_images=range(10), g_images=range(30))
    others = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)[:10]
    assert found.num_valid_queries == 10
    assert found.top(1) == (pids[others.argmin(1)] == pids[:10]).double().mean().item()
    twice = rank_metrics(x[:1], x[[0, 0, 1]], [1], [1, 1, 1], q_images=[5], g_images=[5, 5, 6])
    assert (twice.mAP, twice.ap.tolist()) == (1.0, [1.0])
    contrary = rank_metrics(x[:1], x[[0, 1]], [1], [2, 1], [0], [1, 1], q_images=[5], g_images=[5, 6])
    assert contrary.top(1) == 1.0
    with pytest.warns(UserWarning, match="are NaN: every true match is the query's own image"):
        rank_metrics(x[:1], x[[0, 1]], [1], [1, 2], q_images=[5], g_images=[5, 6])
    with pytest.raises(ValueError, match="q_images and g_images must be given together, got no g_images"):
        rank_metrics(x[:1], x[:1], [1], [1], q_images=[5])


def test_a_set_against_itself_without_numbers_of_its_images_warns(clustered):
    x, pids = clustered(12, 4), torch.arange(12) % 3
    for sets in ({"query": x, "gallery": x.clone()}, {"query": None, "gallery": None, "distmat": torch.cdist(x, x)}):
        if "distmat" in sets:
            sets["distmat"].fill_diagonal_(0)
        with pytest.warns(UserWarning, match="query and gallery are the same images and each finds itself first"):
            assert rank_metrics(**sets, q_pids=pids, g_pids=pids).top(1) == 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            own = rank_metrics(**sets, q_pids=pids, g_pids=pids, q_images=range(12), g_images=range(12))
        assert own.num_valid_queries == 12


def test_top_is_defined_for_every_rank_from_1_on():
    found = rank_metrics(None, None, [1], [2, 1], distmat=torch.tensor([[0.0, 1.0]]), max_rank=5)
    assert [found.top(rank) for rank in (1, 2, 5, 6, 200, np.int64(2))] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"RankMetrics.top: rank must be at least 1, got {rank}"):
            found.top(rank)
    with pytest.raises(TypeError, match=r"RankMetrics.top: rank must be an integer, got 1\.5"):
        found.top(1.5)


@pytest.mark.parametrize(
    ("pids", "error", "message"),
    [
        ([10**20, 1], ValueError, r"q_pids must lie in \[-2\*\*63, 2\*\*63\), got 100000000000000000000"),
        (np.array([10**20, 1]), ValueError, r"q_pids must lie in \[-2\*\*63, 2\*\*63\), got 100000000000000000000"),
        (np.array([2**64 - 2, 1], np.uint64), ValueError, r"q_pids must be below 2\*\*63, got 18446744073709551614"),
        (["a", "b"], TypeError, "q_pids must hold numbers in equal rows, got list"),
    ],
)
def test_identities_beyond_int64_are_named(pids, error, message):
    with pytest.raises(error, match=f"rank_metrics: {message}"):
        rank_metrics(None, None, pids, [1, 2], distmat=torch.rand(2, 2))


def test_identities_as_large_as_int64_holds_are_ranked():
    big = 2**63 - 1
    found = rank_metrics(None, None, [big, -big], [-big, big], distmat=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert found.top(1) == 1.0


def test_torch_s_default_device_does_not_matter(clustered):
    """ "meta" stands for a device that is not there."""
    x = clustered(20, 4)
    pids = (torch.arange(20) % 4).tolist()
    expected = rank_metrics(x[:5], x[5:], pids[:5], pids[5:])
    torch.set_default_device("meta")
    try:
        found = rank_metrics(x[:5], x[5:], pids[:5], pids[5:])
        in_lists = rank_metrics(x[:5].tolist(), x[5:].tolist(), pids[:5], pids[5:], [0] * 5, [1] * 15)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found.ap, expected.ap)
    assert torch.equal(in_lists.ap, expected.ap)
    assert torch.equal(found.cmc, expected.cmc)


@pytest.mark.parametrize("power", [-100, -70, 62])
def test_the_scale_of_features_does_not_matter(clustered, power):
    """Where float32 does not hold their squares, distances must not all be 0 or infinite and rank by index."""
    x, pids = clustered(60, 8), torch.arange(60) % 12
    expected = rank_metrics(x[:20], x[20:], pids[:20], pids[20:])
    found = rank_metrics(x[:20] * 2.0**power, x[20:] * 2.0**power, pids[:20], pids[20:])
    assert torch.equal(found.ap, expected.ap)


@pytest.mark.parametrize("given", [(torch.eye(2), torch.eye(2)), (torch.eye(2), None), (None, torch.eye(2))])
def test_features_and_distances_at_once_are_refused(given):
    with pytest.raises(ValueError, match="rank_metrics: query and gallery must be None with distmat, got features as"):
        rank_metrics(*given, [0, 1], [0, 1], distmat=torch.rand(2, 2))

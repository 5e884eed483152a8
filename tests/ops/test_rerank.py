# SPDX-License-Identifier: Apache-2.0
"""Re-ranking: published numbers, the definition, the reference, and never a matrix of all pairs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u import _env
from fastreid_u.ops.jaccard import jaccard_distance
from fastreid_u.ops.rerank import rerank

COMBINATIONS = [(20, 6, 0.3), (10, 3, 0.3), (20, 1, 0.5), (30, 6, 0.0), (20, 6, 1.0)]
backends = pytest.mark.parametrize("backend", ["numba", "reference"])


@backends
@pytest.mark.parametrize(("k1", "k2", "weight"), COMBINATIONS)
@pytest.mark.parametrize("name", ["rerank_q20_g90_sqeuclidean", "rerank_q37_g203_cosine"])
def test_golden_from_stored_distances(golden, name, k1, k2, weight, backend):
    file = golden(name)
    distmats = tuple(file.tensor(part) for part in ("q_g", "q_q", "g_g"))
    found = rerank(None, None, k1, k2, weight, distmats=distmats, backend=backend)
    torch.testing.assert_close(found, file.tensor(f"final_k{k1}_{k2}_l{weight}"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["rerank_q20_g90_sqeuclidean", "rerank_q37_g203_cosine"])
def test_golden_of_the_usual_counts(golden, device, name):
    file = golden(name)
    distmats = tuple(file.tensor(part).to(device) for part in ("q_g", "q_q", "g_g"))
    found = rerank(None, None, distmats=distmats).cpu()
    torch.testing.assert_close(found, file.tensor("final_k20_6_l0.3"), atol=2e-6, rtol=0)


@backends
@pytest.mark.parametrize(("k1", "k2", "weight"), COMBINATIONS)
@pytest.mark.parametrize("name", ["rerank_q20_g90_sqeuclidean", "rerank_q37_g203_cosine"])
def test_golden_from_features(golden, name, k1, k2, weight, backend):
    # the files keep cut-offs 2.5e-6 apart, so distances computed here rank the same
    file = golden(name)
    features = file.tensor("query"), file.tensor("gallery")
    found = rerank(*features, k1, k2, weight, distance=name.split("_")[-1], backend=backend)
    torch.testing.assert_close(found, file.tensor(f"final_k{k1}_{k2}_l{weight}"), atol=4e-6, rtol=0)


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (10, 3)])
def test_golden_of_an_evaluator_that_mixes_another_jaccard(golden, k1, k2):
    """fast-reid's evaluator takes the clustering distance and the plain cosine one; its ``re_ranking`` is as ours."""
    file = golden("rerank_fastreid_evaluator_q30_g150")
    query, gallery = file.tensor("query"), file.tensor("gallery")
    clustering = jaccard_distance(torch.cat([query, gallery]), k1, k2)[:30, 30:]
    mixed = 0.7 * clustering + 0.3 * file.tensor("cosine_dist")
    torch.testing.assert_close(mixed, file.tensor(f"final_evaluator_k{k1}_{k2}_l0.3"), atol=2e-6, rtol=0)
    distances = {name: rerank(query, gallery, k1, k2, distance=name) for name in ("cosine", "sqeuclidean")}
    published = file.tensor(f"final_re_ranking_k{k1}_{k2}_l0.3")
    torch.testing.assert_close(distances["cosine"], published, atol=4e-6, rtol=0)
    assert (distances["sqeuclidean"] - published).abs().max() < 4e-6, "unit rows: half of it, and the half cancels"
    assert (mixed - published).abs().max() > 0.2


@backends
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 6)])
def test_golden_jaccard_of_lists_with_one_more(golden, k1, k2, backend):
    """CAP and ICE have another Jaccard distance: k1 + 1 entries a list, exp of minus the distance over its maximum.

    That is re-ranking without the original distance, and with the distance squared once.
    """
    file = golden("jaccard_variants_n180")
    x, published = file.tensor("features"), torch.from_numpy(file.matrix(f"dist_cap_torch_k{k1}_{k2}"))
    found = rerank(x[:70], x[70:], k1, k2, 0, distance="euclidean", backend=backend)
    torch.testing.assert_close(found, published[:70, 70:], atol=2e-6, rtol=0)


def by_definition(distance, num_query, k1, k2, weight):
    """Dense float64 matrices and Python sets."""
    n = len(distance)
    original = (distance**2 / (distance**2).max(0)).T
    ranking = original.argsort(1, kind="stable")
    half = int(np.around(k1 / 2)) + 1

    def mutual(i, k):
        return {j for j in ranking[i, :k] if i in ranking[j, :k]}

    v = np.zeros((n, n))
    for i in range(n):
        core = mutual(i, k1 + 1)
        members = set(core)
        for q in core:
            candidate = mutual(q, half)
            if 3 * len(candidate & core) > 2 * len(candidate):
                members |= candidate
        members = sorted(members)
        v[i, members] = np.exp(-original[i, members]) / np.exp(-original[i, members]).sum()
    if k2 != 1:
        v = v[ranking[:, :k2]].mean(1)
    overlap = np.minimum(v[:num_query, None], v[None, num_query:]).sum(-1)
    return (1 - weight) * (1 - overlap / (2 - overlap)) + weight * original[:num_query, num_query:]


@backends
@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize(("q", "g"), [(1, 30), (13, 41), (30, 7)])
def test_matches_definition(clustered, distance, q, g, backend):
    x = clustered(q + g, 10, number=q) * torch.linspace(0.8, 1.3, q + g)[:, None]
    if distance == "cosine":
        unit = F.normalize(x.double())
        whole = 1 - unit @ unit.T
    else:
        whole = (x.double()[:, None] - x.double()).square().sum(-1)
        whole = whole if distance == "sqeuclidean" else whole.sqrt()
    expected = by_definition(whole.numpy(), q, 9, 3, 0.3)
    found = rerank(x[:q], x[q:], 9, 3, 0.3, distance=distance, backend=backend)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (q, g))
    np.testing.assert_allclose(found.numpy(), expected, atol=4e-6)


def test_lambda_one_is_the_scaled_distance(clustered):
    x = clustered(40, 8)
    found = rerank(x[:10], x[10:], lambda_value=1.0)
    squared = (x.double()[:, None] - x.double()).square().sum(-1).square()
    scaled = (squared / squared.amax(0)).T[:10, 10:]
    torch.testing.assert_close(found.double(), scaled, atol=1e-6, rtol=0)


def features(case):
    """Query and gallery of a kind that has ties, copies, zeros or no structure."""
    rng = np.random.default_rng(case)
    n, d = int(rng.integers(2, 120)), int(rng.integers(1, 16))
    x = rng.normal(size=(n, d))
    kind = ["noise", "copies", "all copies", "common mean", "zero rows", "identities", "few"][case % 7]
    if kind == "copies":
        x = x[rng.integers(0, max(1, n // 4), n)]
    elif kind == "all copies":
        x[:] = x[0]
    elif kind == "common mean":
        x = x * 1e-3 + 7
    elif kind == "zero rows":
        x[rng.random(n) < 0.3] = 0
    elif kind == "identities":
        x = x[rng.integers(0, max(1, n // 15), n)] * 3 + 0.5 * x
    elif kind == "few":
        x = x[:3]
    split = int(rng.integers(1, len(x)))
    x = torch.from_numpy(x).float()
    return x[:split], x[split:], int(rng.integers(1, 25)), int(rng.integers(1, 30)), float(rng.random())


@pytest.mark.filterwarnings("ignore:rerank. k")
@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("case", range(28))
def test_equals_the_reference(case, distance):
    query, gallery, k1, k2, weight = features(case)
    if distance == "cosine" and case % 7 in (1, 2):  # rows of one direction: their distances are rounding errors
        query, gallery = (rows.bfloat16().float() for rows in (query, gallery))
    found, expected = (
        rerank(query, gallery, k1, k2, weight, distance=distance, backend=backend) for backend in ("numba", "reference")
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("case", range(6))
def test_equals_the_reference_on_any_matrices(case):
    """Not symmetric, with ties, zeros on no diagonal: what is read is the column, divided by its maximum."""
    rng = np.random.default_rng(case)
    q, g = int(rng.integers(1, 30)), int(rng.integers(1, 60))
    shapes = (q, g), (q, q), (g, g)
    made = [rng.random(shape) if case % 2 else rng.integers(0, 6, shape) for shape in shapes]
    if case == 4:
        made = [np.zeros(shape) for shape in shapes]
    distmats = tuple(torch.from_numpy(part).float() for part in made)
    k1 = min(7, q + g - 1)
    found, expected = (
        rerank(None, None, k1, min(4, q + g), 0.3, distmats=distmats, backend=backend)
        for backend in ("numba", "reference")
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_copies_and_identical_points():
    assert (rerank(torch.ones(3, 4), torch.ones(5, 4), k1=4, k2=2) <= 1).all()
    x = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    found = rerank(x[:10], x, k1=8, k2=3)
    assert (found.argmin(dim=1) == torch.arange(10)).all(), "each query's copy in the gallery is nearest"


def test_zero_rows_have_no_direction(clustered):
    x = clustered(50, 8)
    x[[3, 20, 30]] = 0
    found = rerank(x[:10], x[10:], 5, 1, 1.0, distance="cosine")
    largest = (1 - x @ x.T).amax(dim=0)[:10, None].square()
    torch.testing.assert_close(found[3, [10, 20]], torch.zeros(2))
    rest = torch.ones(40, dtype=torch.bool)
    rest[[10, 20]] = False
    torch.testing.assert_close(found[3, rest], torch.ones(38))  # all at the distance of the farthest
    torch.testing.assert_close(found[:3, 10], (1 / largest[:3, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("top", [1, 7, 50])
def test_top_is_the_start_of_each_row(clustered, top):
    x = clustered(80, 10)
    x[40:60] = x[60:]  # copies tie
    dense = rerank(x[:30], x[30:], 12, 4)
    for backend in ("numba", "reference"):
        distance, index = rerank(x[:30], x[30:], 12, 4, top=top, backend=backend)
        assert (distance.dtype, index.dtype, tuple(index.shape)) == (torch.float32, torch.int64, (30, top))
        whole = rerank(x[:30], x[30:], 12, 4, backend=backend)
        assert torch.equal(distance, whole.gather(1, index))
        assert torch.equal(index, whole.sort(dim=1, stable=True).indices[:, :top])
    torch.testing.assert_close(distance, dense.sort(dim=1).values[:, :top], atol=2e-6, rtol=0)


def test_top_beyond_the_gallery_is_clipped(clustered):
    x = clustered(40, 6)
    with pytest.warns(UserWarning, match="rerank: top=100 is more than the data have, using 30"):
        index = rerank(x[:10], x[10:], top=100)[1]
    assert torch.equal(index.sort(dim=1).values, torch.arange(30).expand(10, 30))
    assert tuple(rerank(x[:0], x, 1, 1, top=3)[1].shape) == (0, 3)


def test_blocks_and_threads_do_not_matter(clustered, monkeypatch):
    from fastreid_u.ops import _scaled_distance
    from fastreid_u.ops import rerank as module

    x = clustered(150, 12)
    matrices = tuple(torch.cdist(a, b).square() for a, b in ((x[:60], x[60:]), (x[:60], x[:60]), (x[60:], x[60:])))
    features, usual = (x[:60], x[60:]), torch.get_num_threads()
    expected = rerank(*features), rerank(None, None, distmats=matrices), rerank(*features, top=5)[1]
    monkeypatch.setattr(module, "_BLOCK", 200)
    monkeypatch.setattr(_scaled_distance, "_BLOCK", 2000)
    monkeypatch.setattr(_scaled_distance, "_CACHED", 100)
    monkeypatch.setattr(_scaled_distance, "_TILE", 37)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(rerank(*features), expected[0], atol=1e-7, rtol=0)
            assert torch.equal(rerank(None, None, distmats=matrices), expected[1])
            assert torch.equal(rerank(*features, top=5)[1], expected[2])
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_scale_of_the_features_does_not_matter(clustered, scale):
    x = clustered(60, 8)
    torch.testing.assert_close(rerank(scale * x[:20], scale * x[20:]), rerank(x[:20], x[20:]), atol=2e-6, rtol=0)


MEASURE = """
import json, re, torch
from fastreid_u.ops.rerank import rerank
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
def features(n):
    x = torch.randn(n // 12 + 1, 16, generator=generator)[torch.randint(n // 12 + 1, (n,), generator=generator)]
    return torch.nn.functional.normalize(x + 0.4 * torch.randn(n, 16, generator=generator))
def peak():  # of this program alone: the maximum of getrusage begins at what its parent held
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
x = features(4100)
rerank(x[:100], x[100:], top=10)  # compiled, and one block of everything in place
found = [peak()]
for n in (5000, 8000, 13000):
    x = features(n)
    rerank(x[:100], x[100:], top=10)
    found.append(peak())
print(json.dumps(found))
"""


def test_memory_grows_with_the_images_not_their_square():
    """In MB of resident memory: four bytes for each pair of 13,000 would be 645."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, *peaks = json.loads(run.stdout)
    assert peaks[-1] - before < 150, peaks


def test_without_numba_the_reference_runs_and_says_why(clustered, monkeypatch):
    x = clustered(40, 6)
    expected = rerank(x[:10], x[10:], backend="reference")
    monkeypatch.setattr(_env, "numba", lambda: _env.Capability("numba", False, "pip install numba"))
    with pytest.warns(RuntimeWarning, match="rerank: pip install numba, running the slow reference"):
        assert torch.equal(rerank(x[:10], x[10:]), expected)
    with pytest.raises(RuntimeError, match="backend must be able to run here, got 'numba': pip install numba"):
        rerank(x[:10], x[10:], backend="numba")
    with pytest.raises(RuntimeError, match="rerank: backend must run on cpu tensors, got 'triton'"):
        rerank(x[:10], x[10:], backend="triton")


@pytest.mark.parametrize(("q", "g"), [(0, 5), (4, 0), (0, 0)])
def test_empty(q, g):
    assert tuple(rerank(torch.zeros(q, 3), torch.zeros(g, 3), 1, 1).shape) == (q, g)


def test_counts_beyond_the_data_are_clipped(clustered):
    x = clustered(8, 4)
    with pytest.warns(UserWarning, match="rerank: k1=20, k2=6 is more than the 8 images there are, clipped"):
        found = rerank(x[:3], x[3:])
    assert torch.equal(found, rerank(x[:3], x[3:], 7, 6))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambda_value": 1.1}, ValueError, r"lambda_value must lie in \[0, 1\], got 1.1"),
        ({"k1": 0}, ValueError, "k1 must be at least 1, got 0"),
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
        ({"top": 2.0}, TypeError, "top must be an integer, got 2.0"),
        ({"query": torch.full((2, 4), torch.inf)}, ValueError, "query must be finite, got NaN or infinity in 2 of 2"),
        ({"distance": "l1"}, ValueError, "distance must be one of 'sqeuclidean', 'euclidean', 'cosine', got 'l1'"),
        ({"query": None}, ValueError, "query and gallery must be given without distmats, got None"),
        ({"gallery": torch.ones(3, 9)}, ValueError, "gallery must have 4 columns like query, got 9"),
        ({"distmats": torch.ones(2, 3)}, TypeError, r"distmats must be three matrices \(q_g, q_q, g_g\), got Tensor"),
        (
            {"distmats": (torch.ones(2, 3), torch.ones(3, 3), torch.ones(3, 3))},
            ValueError,
            r"q_q must have shape \(2, 2\) beside q_g, got \(3, 3\)",
        ),
    ],
)
def test_rejects(options, error, message):
    with pytest.raises(error, match=f"rerank: {message}"):
        rerank(**{"query": torch.ones(2, 4), "gallery": torch.ones(3, 4), "k1": 2, "k2": 1, **options})


def test_distances_whose_square_is_beyond_float32_are_refused():
    huge = torch.full((2, 2), 1e20)
    with pytest.raises(ValueError, match=r"rerank: q_g must be below 2\*\*63, as distances are squared, got 1e\+20"):
        rerank(None, None, 2, 2, distmats=(huge, torch.zeros(2, 2), torch.zeros(2, 2)))


def test_both_counts_are_clipped_with_one_warning():
    with pytest.warns(UserWarning, match="rerank: k1=20, k2=9 is more than the 5 images there are") as caught:
        rerank(torch.eye(5)[:2], torch.eye(5)[2:], 20, 9)
    assert len(caught) == 1


# on a GPU, against what a CPU gives


@pytest.mark.gpu
@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize(("q", "g"), [(1, 1), (1, 300), (65, 1000), (513, 4000), (1000, 63)])
def test_gpu_gives_what_a_cpu_gives(clustered, q, g, distance):
    x = clustered(q + g, 64, number=q) * torch.linspace(0.8, 1.2, q + g)[:, None]
    k1, k2 = min(20, q + g - 1), min(6, q + g)
    expected = rerank(x[:q], x[q:], k1, k2, distance=distance)
    found = rerank(x[:q].cuda(), x[q:].cuda(), k1, k2, distance=distance, backend="triton")
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_gpu_top_is_repeatable(clustered):
    x = clustered(3000, 32, spread=1.2).cuda()
    found = [rerank(x[:500], x[500:], top=50) for _ in range(3)]
    expected = rerank(x[:500].cpu(), x[500:].cpu(), top=50)
    for distance, index in found:
        assert torch.equal(distance, found[0][0])
        assert torch.equal(index, found[0][1])
    torch.testing.assert_close(found[0][0].cpu(), expected[0], atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_gpu_copies(clustered):
    x = clustered(1200, 16)
    x[300:500] = x[3]
    torch.testing.assert_close(
        rerank(x[:400].cuda(), x[400:].cuda()).cpu(), rerank(x[:400], x[400:]), atol=1e-6, rtol=0
    )


@pytest.mark.gpu
def test_gpu_no_square_of_the_images(clustered):
    n = 40_000
    x = clustered(n, 64).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rerank(x[:500], x[500:], top=10)
    assert torch.cuda.max_memory_allocated() - before < 800e6 + 20_000 * n  # all pairs: 6.4 GB in float32

# SPDX-License-Identifier: Apache-2.0
"""Exact copies (frozen video frames, placeholder images, black crops) are re-ranked alike, in any order of the rows."""

import numpy as np
import pytest
import torch

from fastreid_u.ops import rerank as op
from fastreid_u.ops.rerank import STYLES, rerank
from fastreid_u.reference import knn as reference_knn

SETS = 20  # of those of ``drawn``; 200 have been compared
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["numba", "reference", "triton"]
ROUNDING = {"numba": 0, "triton": 0, "reference": 1e-6}  # of a Jaccard distance: sums of integers, or of float32


def drawn(case):
    """Query and gallery, (place, image) each: points around a few centres, some of them many times over; k1 and k2.

    Equal images are equal rows. Every copied image is in the query and in the gallery.
    """
    rng = np.random.default_rng(case)
    n, copied = int(rng.integers(16, 40)), int(rng.integers(1, 4))
    x = rng.normal(size=(3, 6))[rng.integers(0, 3, n)] + 0.3 * rng.normal(size=(n, 6))
    if case % 3 == 0:
        x = np.rint(2 * x) / 2  # different images at equal distances, and more copies
    copies = np.arange(copied).repeat(rng.integers(2, 41, copied) - 1)
    image = np.concatenate([rng.permutation(np.arange(copied, n)), copies])
    in_query = rng.random(len(image)) < 0.4
    in_query[0], in_query[1] = True, False
    parts = np.append(np.arange(copied), image[in_query]), np.append(np.arange(copied), image[~in_query])
    x = torch.from_numpy(x).float()
    query, gallery = (x[rng.permutation(part)] for part in parts)
    return query, gallery, int(rng.integers(5, min(20, n - 1) + 1)), int(rng.integers(2, 7))


def run(query, gallery, k1, k2, weight=0.0, *, backend="numba", **options):
    """``rerank``; "triton", refused on a CPU, by its function, interpreted."""
    if backend != "triton":
        return rerank(query, gallery, k1, k2, weight, backend=backend, **options)
    options = {"distance": "sqeuclidean", "distmats": None, "top": None, **options}
    query, gallery = (None if rows is None else rows.to(DEVICE) for rows in (query, gallery))
    options["distmats"] = options["distmats"] and tuple(part.to(DEVICE) for part in options["distmats"])
    return op._triton(query, gallery, k1, k2, weight, **options).cpu()


def matrices(query, gallery):
    """Ready distances in which copies are 0 apart and have equal columns."""
    return tuple(
        (a.double()[:, None] - b.double()).square().sum(-1).float()
        for a, b in ((query, gallery), (query, query), (gallery, gallery))
    )


def assert_alike(found, query, gallery, atol=0.0):
    """Copies in the query have one row, copies in the gallery one column."""
    for values, images in ((found, query), (found.T, gallery)):
        first = (images[:, None] == images).all(-1).int().argmax(dim=1)
        torch.testing.assert_close(values, values[first], atol=atol, rtol=0)


def assert_copies_are_one(query, gallery, k1, k2, **options):
    atol = ROUNDING[options.get("backend", "numba")]
    jaccard = run(query, gallery, k1, k2, **options)
    assert_alike(jaccard, query, gallery, atol)
    assert jaccard[(query[:, None] == gallery).all(-1)].abs().max() <= atol
    assert_alike(run(query, gallery, k1, k2, 0.3, **options), query, gallery, 1e-7 + atol)
    if options["style"] != "clustering":
        given = {**options, "distmats": matrices(query, gallery)}
        jaccard = run(None, None, k1, k2, **given)
        assert jaccard[(query[:, None] == gallery).all(-1)].abs().max() <= atol
        assert_alike(run(None, None, k1, k2, 0.3, **given), query, gallery, atol)


@pytest.mark.parametrize("case", range(SETS))
def test_copies_have_one_result_and_are_0_apart(case):
    query, gallery, k1, k2 = drawn(case)
    backend = "reference" if case % 5 == 0 else "numba"
    for number in range(2):
        for style in STYLES:
            assert_copies_are_one(query, gallery, k1, min(k1, k2), style=style, backend=backend)
        generator = torch.Generator().manual_seed(number)
        query, gallery = (x[torch.randperm(len(x), generator=generator)] for x in (query, gallery))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_about_copies(monkeypatch, backend, style):
    if backend == "triton":
        pytest.importorskip("triton", reason="there is no triton for this platform")
        if DEVICE == "cpu":  # the search has tests of its own, and takes long when interpreted
            monkeypatch.setattr(op, "nearest_neighbours", lambda x, k, backend: reference_knn.knn(x, k))
    query, gallery, _, _ = drawn(1)
    query, gallery = (torch.cat([x[:9], query[:1].expand(7, -1)]) for x in (query, gallery))
    assert_copies_are_one(query, gallery, 6, 3, style=style, backend=backend)
    found = run(query, gallery, 6, 3, 0.3, style=style, backend=backend)
    torch.testing.assert_close(found, rerank(query, gallery, 6, 3, style=style), atol=3e-6, rtol=0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_order_of_rows_is_nothing_to_copies(clustered, style, backend):
    x = torch.cat([clustered(40, 6), clustered(40, 6)[:2].repeat_interleave(15, 0)])
    query, gallery = x[::3], x[torch.arange(len(x)) % 3 > 0]
    expected = run(query, gallery, 8, 4, 0.3, style=style, backend=backend)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        row, column = (torch.randperm(len(part), generator=generator) for part in (query, gallery))
        found = run(query[row], gallery[column], 8, 4, 0.3, style=style, backend=backend)
        torch.testing.assert_close(found, expected[row][:, column], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (6, 6), (5, 2), (8, 30)])
@pytest.mark.parametrize("copies", [2, 11, 60])
def test_identical_images_are_0_apart(copies, k1, k2):
    x = torch.full((copies, 4), 0.5)
    k1, k2, cut = min(k1, copies - 1), min(k2, copies), copies // 2
    for style in STYLES[:2]:
        assert (rerank(x[:cut], x[cut:], k1, k2, style=style) == 0).all()


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_matrices_that_leave_an_image_without_neighbours_leave_copies_alike_but_not_at_0(backend):
    """An image far from itself is not its own reciprocal neighbour; five rows are averaged, and its row is empty."""
    x = torch.arange(12.0)[:, None]
    query, gallery = x, x.repeat_interleave(2, 0)
    q_g, q_q, g_g = matrices(query, gallery)
    q_g[3, 6:8] = q_q[3, 3] = g_g[6:8, 6:8] = 100
    found = rerank(None, None, 2, 5, 0, distmats=(q_g, q_q, g_g), backend=backend)
    assert_alike(found, query, gallery, ROUNDING[backend])
    torch.testing.assert_close(found[2, 4:6], torch.full((2,), 1 / 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[9, 18:20], torch.zeros(2), atol=ROUNDING[backend], rtol=0)

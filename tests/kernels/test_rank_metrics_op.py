# SPDX-License-Identifier: Apache-2.0
"""``rank_metrics`` as a GPU runs it, interpreted: on a CPU the backend is refused, so it is let in here."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no triton for this platform")

import fastreid_u
from fastreid_u.ops import _dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_anywhere(monkeypatch):
    monkeypatch.setitem(_dispatch.PREFERENCE, "cpu", ("triton", "numba", "reference"))


@pytest.mark.parametrize("ap", ["rank", "sklearn", "trapezoid"])
@pytest.mark.parametrize("source", ["features", "matrix"])
def test_equals_the_oracle(clustered, triton_anywhere, ap, source):
    x = clustered(70, 9)
    x[40:] = x[[5, 30] * 15]  # copies, so ties
    generator = torch.Generator().manual_seed(3)
    people, cameras = (torch.randint(n, (70,), generator=generator) for n in (6, 3))
    people[2] = 99  # no match
    ids = (people[:25], people[25:], cameras[:25], cameras[25:])
    given = {"q_images": torch.arange(25), "g_images": torch.arange(20, 65), "ap": ap, "max_rank": 30}
    query, gallery = (part.to(DEVICE) for part in (x[:25], x[25:]))
    if source == "matrix":
        given["distmat"] = torch.cdist(query, gallery).mul(8).round()
        query = gallery = None
    found = fastreid_u.rank_metrics(query, gallery, *ids, backend="triton", **given)
    right = fastreid_u.rank_metrics(query, gallery, *ids, backend="reference", **given)
    assert torch.equal(found.valid, right.valid)
    for name in ("cmc", "ap", "inp"):
        torch.testing.assert_close(getattr(found, name), getattr(right, name), rtol=0, atol=1e-12)
    assert (found.mAP, found.mINP) == pytest.approx((right.mAP, right.mINP), abs=1e-12)

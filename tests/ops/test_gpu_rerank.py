# SPDX-License-Identifier: Apache-2.0
"""Re-ranking on a GPU gives what it gives on a CPU, and takes no matrix of all pairs."""

import pytest
import torch

from fastreid_u.ops.rerank import rerank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize(("q", "g"), [(1, 1), (1, 300), (65, 1000), (513, 4000), (1000, 63)])
def test_features(clustered, q, g, distance):
    x = clustered(q + g, 64, number=q) * torch.linspace(0.8, 1.2, q + g)[:, None]
    k1, k2 = min(20, q + g - 1), min(6, q + g)
    expected = rerank(x[:q], x[q:], k1, k2, distance=distance)
    found = rerank(x[:q].cuda(), x[q:].cuda(), k1, k2, distance=distance, backend="triton")
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["rerank_q20_g90_sqeuclidean", "rerank_q37_g203_cosine"])
def test_golden_from_stored_distances(golden, name):
    file = golden(name)
    distmats = tuple(file.tensor(part).cuda() for part in ("q_g", "q_q", "g_g"))
    found = rerank(None, None, distmats=distmats, backend="triton").cpu()
    torch.testing.assert_close(found, file.tensor("final_k20_6_l0.3"), atol=2e-6, rtol=0)


def test_top_is_repeatable(clustered):
    x = clustered(3000, 32, spread=1.2).cuda()
    found = [rerank(x[:500], x[500:], top=50) for _ in range(3)]
    expected = rerank(x[:500].cpu(), x[500:].cpu(), top=50)
    for distance, index in found:
        assert torch.equal(distance, found[0][0])
        assert torch.equal(index, found[0][1])
    torch.testing.assert_close(found[0][0].cpu(), expected[0], atol=1e-6, rtol=0)


def test_copies(clustered):
    x = clustered(1200, 16)
    x[300:500] = x[3]
    torch.testing.assert_close(
        rerank(x[:400].cuda(), x[400:].cuda()).cpu(), rerank(x[:400], x[400:]), atol=1e-6, rtol=0
    )


def test_no_square_of_the_images(clustered):
    n = 40_000
    x = clustered(n, 64).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rerank(x[:500], x[500:], top=10)
    assert torch.cuda.max_memory_allocated() - before < 800e6 + 20_000 * n  # all pairs: 6.4 GB in float32

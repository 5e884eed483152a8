# SPDX-License-Identifier: Apache-2.0
"""Sums and means over labels."""

import pytest
import torch

from fastreid_u.ops.segments import segment_mean, segment_sizes, segment_sum
from fastreid_u.reference import segments as reference

OPS = ["segment_sum", "segment_mean"]
RUN = {"segment_sum": segment_sum, "segment_mean": segment_mean}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d", "c"), [(0, 3, 4), (1, 1, 1), (50, 7, 9)])
def test_matches_the_reference(name, dtype, n, d, c):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator).to(dtype)
    labels = torch.randint(-1, c, (n,), generator=generator)
    for count in (None, c, c + 3):
        found, expected = RUN[name](x, labels, count), getattr(reference, name)(x, labels, count)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_cluster_sums_turn_mean_similarities_into_one_product():
    """The mean over a cluster of <x, v_j> is <x, mean v_j>: what an instance memory needs of its rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator, dtype=torch.float64))
    labels, x = torch.arange(40) % 7, torch.randn(6, generator=generator, dtype=torch.float64)
    mean_similarity = torch.stack([(rows[labels == c] @ x).mean() for c in range(7)])
    torch.testing.assert_close(segment_mean(rows, labels) @ x, mean_similarity, rtol=1e-14, atol=1e-15)


def test_same_bits_every_time():
    x = torch.randn(3000, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(3000) % 3
    assert torch.equal(segment_sum(x, labels), segment_sum(x, labels))
    in_order = x[labels == 1].cumsum(dim=0)[-1]
    torch.testing.assert_close(segment_sum(x, labels)[1], in_order, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, -1, 0, 2, 2])
    assert torch.autograd.gradcheck(lambda x: RUN[name](x, labels, 4), (x,))


def test_sizes():
    assert segment_sizes(torch.tensor([0, 2, -1, 2]), 4).tolist() == [1, 0, 2, 0]
    assert segment_sizes(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 0]


def test_left_out_rows_may_hold_anything():
    x = torch.tensor([[1.0], [torch.nan], [2.0]])
    assert segment_sum(x, torch.tensor([0, -1, 0])).tolist() == [[3.0]]


def test_compiles_whole():
    run = torch.compile(lambda x, y: segment_mean(x, y, 4), backend="aot_eager", fullgraph=True)
    x, labels = torch.randn(9, 3), torch.arange(9) % 5 - 1
    assert torch.equal(run(x, labels), segment_mean(x, labels, 4))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("x", "labels", "count", "error", "message"),
    [
        (torch.ones(2, 2), torch.tensor([0]), None, ValueError, "labels must have one entry for each row of x"),
        (torch.ones(2, 2), torch.tensor([0, -2]), None, ValueError, "labels must lie in .*, got -2"),
        (torch.ones(2, 2), torch.tensor([0, 3]), 3, ValueError, r"labels must lie in \[0, 3\), got 3"),
        (torch.ones(2, 2), torch.tensor([0, 1]), -1, ValueError, "num_segments must be at least 0"),
        (torch.ones(2, 2), torch.tensor([0.0, 1.0]), None, TypeError, "labels must hold integers"),
        (torch.ones(2, 2).long(), torch.tensor([0, 1]), None, TypeError, "x must be floating point"),
    ],
)
def test_rejects(name, x, labels, count, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        RUN[name](x, labels, count)

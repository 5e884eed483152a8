# SPDX-License-Identifier: Apache-2.0
"""Agreement of neighbour lists."""

import pytest
import torch

from fastreid_u.ops.knn import knn
from fastreid_u.ops.neighbour_overlap import neighbour_overlap
from fastreid_u.reference.neighbour_overlap import neighbour_overlap as reference


@pytest.mark.parametrize(("n", "k", "length"), [(0, 3, 3), (1, 1, 1), (30, 6, 6), (20, 5, 9), (4, 0, 3), (4, 0, 0)])
def test_matches_the_reference(n, k, length):
    generator = torch.Generator().manual_seed(k)
    lists = [
        torch.stack([torch.randperm(12, generator=generator)[:width] for _ in range(n)])
        if n
        else torch.zeros(0, width).long()
        for width in (k, length)
    ]
    assert torch.equal(neighbour_overlap(*lists), reference(*lists))


def test_by_hand():
    """m common entries of two lists of 20 give m / (40 - m)."""
    whole = torch.arange(20).repeat(21, 1)
    part = whole + torch.arange(21)[:, None]
    common = 20 - torch.arange(21)
    torch.testing.assert_close(neighbour_overlap(whole, part), common / (40 - common))


def test_padding_matches_nothing():
    a, b = torch.tensor([[3, -1, 5], [-1, -1, -1]]), torch.tensor([[5, -1, -2], [-1, -1, -1]])
    assert neighbour_overlap(a, b).tolist() == [0.5, 0.0]


def test_of_knn_lists(clustered):
    x = clustered(60, 8)
    _, index = knn(x, 7)
    same = neighbour_overlap(index[:, 1:], index[:, 1:].flip(1))
    assert (same == 1).all()
    assert neighbour_overlap(index[:, 1:].numpy(), index[:, 1:].int()).tolist() == same.tolist()


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (
            torch.tensor([[1, 2]]),
            torch.tensor([[4, 4]]),
            ValueError,
            r"b must hold no index twice in a row, got \[4, 4\]",
        ),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 2], [3, 4]]), ValueError, "b must have one entry for each row of a"),
        (torch.tensor([1, 2]), torch.tensor([[1, 2]]), ValueError, "a must be 2-D"),
        (torch.tensor([[1.0]]), torch.tensor([[1]]), TypeError, "a must hold integers"),
    ],
)
def test_rejects(a, b, error, message):
    with pytest.raises(error, match=f"neighbour_overlap: {message}"):
        neighbour_overlap(a, b)

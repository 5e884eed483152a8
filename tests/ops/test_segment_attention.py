# SPDX-License-Identifier: Apache-2.0
"""Attention within clusters."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops import segment_attention as home
from fastreid_u.ops.segment_attention import segment_attention
from fastreid_u.ops.segments import segment_mean, segment_sum
from fastreid_u.reference.segment_attention import segment_attention as reference

OUTLIER = F.normalize(
    torch.tensor([[1, 0, 0], [0.98, 0.199, 0], [0.98, 0, 0.199], [0.5, 0, -0.866]], dtype=torch.float64)
)


def rows(n, d=8, labels=5):
    generator = torch.Generator().manual_seed(n)
    x = F.normalize(torch.randn(2, n, d, generator=generator, dtype=torch.float64), dim=2)
    return x[0], x[1], torch.randint(-1, labels, (n,), generator=generator)


def test_by_hand():
    """An intruder among four: least attended to, most dispersed, nearly absent from the prototype."""
    labels = torch.zeros(4, dtype=torch.int64)
    received = segment_attention(OUTLIER, OUTLIER, labels, heads=1)[:, 0]
    torch.testing.assert_close(received.tolist(), [0.394752, 0.346669, 0.256354, 0.002225], atol=2e-6, rtol=0)
    dispersion = -torch.log(4 * received)
    torch.testing.assert_close(dispersion.tolist(), [-0.4568, -0.3269, -0.0251, 4.7219], atol=1e-4, rtol=0)
    assert dispersion.argmax() == 3
    prototype = F.normalize(segment_sum(OUTLIER * received[:, None], labels))[0]
    torch.testing.assert_close(prototype.tolist(), [0.996339, 0.069652, 0.049561], atol=2e-6, rtol=0)
    plain = F.normalize(segment_mean(OUTLIER, labels))[0]
    torch.testing.assert_close(plain.tolist(), [0.980358, 0.056385, -0.188993], atol=2e-6, rtol=0)


@pytest.mark.parametrize("mask_self", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_matches_the_reference(n, heads, mask_self):
    settings = {"heads": heads, "mask_self": mask_self, "scale": torch.linspace(1, 3, heads)}
    query, key, labels = rows(n)
    found = segment_attention(query, key, labels, **settings)
    torch.testing.assert_close(found, reference(query, key, labels, **settings))
    for label in range(5):
        total = found[labels == label].sum(dim=0)
        torch.testing.assert_close(total, torch.ones_like(total) * bool((labels == label).any()))


@pytest.mark.parametrize(("block", "group"), [(1, 1), (40, 1), (200, 9), (500, 16), (3199, 256)])
def test_blocks_change_nothing(monkeypatch, block, group):
    """Rows one at a time, a few, whole segments, several segments together: 40 rows, two heads, sizes 0 to 12."""
    query, key, labels = rows(40)
    expected = segment_attention(query, key, labels, heads=2)
    largest = []
    attend = home._attend

    def watched(query, key, *rest):
        largest.append(2 * len(query) * len(key))
        return attend(query, key, *rest)

    monkeypatch.setattr(home, "BLOCK", block)
    monkeypatch.setattr(home, "GROUP", group)
    monkeypatch.setattr(home, "_attend", watched)
    torch.testing.assert_close(segment_attention(query, key, labels, heads=2), expected)
    assert len(largest) > 1 or block == 3199
    assert max(largest) <= max(block, 2 * 40)  # one row of all columns, at least


@pytest.mark.parametrize("block", [2**24, 60])
def test_gradcheck(monkeypatch, block):
    monkeypatch.setattr(home, "BLOCK", block)
    monkeypatch.setattr(home, "GROUP", 4)
    query, key, labels = rows(9, 4, 3)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def run(query, key, scale):
        return segment_attention(query, key, labels, heads=2, scale=scale)

    assert torch.autograd.gradcheck(run, tuple(each.requires_grad_() for each in (query, key, scale)))


def test_order_of_the_rows_does_not_matter():
    query, key, labels = rows(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = segment_attention(query[order], key[order], labels[order], heads=2)
    torch.testing.assert_close(moved, segment_attention(query, key, labels, heads=2)[order])


def test_copies_are_attended_to_alike():
    x = torch.ones(5, 8) / 8**0.5
    received = segment_attention(x, x, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(received, torch.full((5, 8), 0.2))
    uniform = F.normalize(segment_sum(x * received.mean(1, keepdim=True), torch.zeros(5, dtype=torch.int64)))
    torch.testing.assert_close(uniform, F.normalize(segment_mean(x, torch.zeros(5, dtype=torch.int64))))


def test_alone_it_attends_to_itself():
    x = rows(3)[0]
    assert (segment_attention(x, x, torch.tensor([0, 1, -1])) == torch.tensor([[1.0], [1.0], [0.0]])).all()


def test_half_precision_and_compiled():
    query, key, labels = rows(12)
    found = segment_attention(query.half(), key.half(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, segment_attention(query, key, labels).float(), atol=1e-2, rtol=1e-2)
    compiled = torch.compile(segment_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, labels), segment_attention(query, key, labels))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.ones(3, 4)}, ValueError, "key must have 8 columns like query"),
        ({"key": torch.ones(2, 8)}, ValueError, "key must have one entry for each row of query"),
        ({"labels": torch.zeros(2).long()}, ValueError, "labels must have one entry for each row of query"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must hold integers"),
        ({"heads": 3}, ValueError, "heads must divide the 8 columns of query, got 3"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"scale": torch.ones(3)}, ValueError, "scale must be a number or hold one for each head"),
    ],
)
def test_rejects(change, error, message):
    arguments = {"query": torch.ones(3, 8), "key": torch.ones(3, 8), "labels": torch.zeros(3).long()} | change
    with pytest.raises(error, match=f"segment_attention: {message}"):
        segment_attention(**arguments)


@pytest.mark.parametrize("rows", [8, 1500])
def test_what_takes_no_part_may_hold_anything(rows):
    """In one block and in several."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % 4
    labels[5] = -1
    wanted = segment_attention(x, x, labels)
    x[5] = torch.nan
    x.requires_grad_()
    found = segment_attention(x, x, labels)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    assert x.grad.isfinite().all()
    assert segment_attention(x, x, torch.full((rows,), -1)).count_nonzero() == 0

# SPDX-License-Identifier: Apache-2.0
"""Losses between two views of a batch."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.consistency_kl import consistency_kl
from fastreid_u.ops.hard_instance_nce import hard_instance_nce


def views(b, d=5, count=3):
    generator = torch.Generator().manual_seed(b)
    return torch.randn(count, b, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["ice_losses_many_proxies", "ice_losses_few_proxies"])
def test_golden(golden, name):
    """The features are the student's as they come; the published consistency term holds its weight of 10."""
    file = golden(name)
    x, view, weak = (file.tensor(key) for key in ("inputs", "ema_inputs_view2", "ema_inputs_weak"))
    losses = {
        "vcl": lambda x: hard_instance_nce(x, view, file.tensor("targets")),
        "kl": lambda x: 10 * consistency_kl(x, view, weak),
    }
    for tag, run in losses.items():
        leaf = x.clone().requires_grad_()
        loss = run(leaf)
        loss.backward()
        torch.testing.assert_close(loss.detach(), file.tensor(f"loss_{tag}"), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad, file.tensor(f"grad_{tag}"), rtol=1e-4, atol=2e-6)


def test_instances_by_hand_in_clusters_of_any_size():
    x, teacher, _ = views(7)
    targets = torch.tensor([4, 4, 4, 9, 9, 0, 4])
    cosine = F.normalize(x) @ F.normalize(teacher).T
    expected = []
    for i in range(7):
        hardest = min(cosine[i, j].item() for j in range(7) if targets[j] == targets[i])
        others = [cosine[i, j].item() for j in range(7) if targets[j] != targets[i]]
        logits = torch.tensor([hardest, *others], dtype=torch.float64) / 0.1
        expected.append((logits.logsumexp(0) - logits[0]).item())
    found = hard_instance_nce(x, teacher, targets)
    assert found.item() == pytest.approx(sum(expected) / 7)
    assert hard_instance_nce(x, teacher, torch.zeros(7)) == 0


def test_consistency_is_a_divergence():
    x, teacher, anchor = views(6)
    p = (F.normalize(x) @ F.normalize(teacher).T / 0.4).log_softmax(1)
    q = (F.normalize(anchor) @ F.normalize(anchor).T / 0.4).softmax(1)
    torch.testing.assert_close(consistency_kl(x, teacher, anchor), F.kl_div(p, q, reduction="batchmean"))
    assert consistency_kl(x, x, x).item() == pytest.approx(0, abs=1e-15)
    assert consistency_kl(x, teacher, anchor, temperature=1e-3) > 0


@pytest.mark.parametrize("name", ["instance", "consistency"])
def test_gradients(name):
    x, teacher, anchor = (view.requires_grad_() for view in views(6))
    targets = torch.tensor([0, 0, 1, 1, 2, 2])

    def loss(x):
        if name == "instance":
            return hard_instance_nce(x, teacher, targets)
        return consistency_kl(x, teacher, anchor)

    assert torch.autograd.gradcheck(loss, (x,))
    loss(x).backward()
    assert teacher.grad is None
    assert anchor.grad is None


def test_nobody_there_half_precision_and_low_temperature():
    nobody = torch.zeros(0, 5, requires_grad=True)
    for loss in (hard_instance_nce(nobody, nobody, torch.zeros(0)), consistency_kl(nobody, nobody, nobody)):
        assert loss == 0
    x, teacher, anchor = views(4).half()
    targets = torch.tensor([0, 0, 1, 1])
    assert hard_instance_nce(x, teacher, targets, temperature=1e-4).isfinite()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert consistency_kl(x, teacher, anchor).dtype == torch.float32
    run = torch.compile(lambda *given: hard_instance_nce(*given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x, teacher, targets), hard_instance_nce(x, teacher, targets))


def test_rejects():
    x, teacher, anchor = views(4)
    with pytest.raises(
        ValueError, match=r"hard_instance_nce: both views must be \(B, D\) of one size, got \(4, 5\) and"
    ):
        hard_instance_nce(x, teacher[:3], torch.zeros(4))
    with pytest.raises(ValueError, match="consistency_kl: temperature must be positive"):
        consistency_kl(x, teacher, anchor, temperature=0)

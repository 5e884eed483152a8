# SPDX-License-Identifier: Apache-2.0
"""ICE's contrast of a view with the hardest instance of its cluster."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.hard_instance_nce import hard_instance_nce


def views(b, d=5, count=3):
    generator = torch.Generator().manual_seed(b)
    return torch.randn(count, b, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["ice_losses_many_proxies", "ice_losses_few_proxies"])
def test_golden(golden, name):
    """The features are the student's as they come."""
    file = golden(name)
    x, view = file.tensor("inputs").requires_grad_(), file.tensor("ema_inputs_view2")
    loss = hard_instance_nce(x, view, file.tensor("targets"))
    loss.backward()
    torch.testing.assert_close(loss.detach(), file.tensor("loss_vcl"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, file.tensor("grad_vcl"), rtol=1e-4, atol=2e-6)


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


def test_gradients():
    x, teacher, _ = (view.requires_grad_() for view in views(6))
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda x: hard_instance_nce(x, teacher, targets), (x,))
    hard_instance_nce(x, teacher, targets).backward()
    assert teacher.grad is None


def test_nobody_there_half_precision_and_low_temperature():
    nobody = torch.zeros(0, 5, requires_grad=True)
    assert hard_instance_nce(nobody, nobody, torch.zeros(0)) == 0
    x, teacher, _ = views(4).half()
    targets = torch.tensor([0, 0, 1, 1])
    assert hard_instance_nce(x, teacher, targets, temperature=1e-4).isfinite()
    run = torch.compile(lambda *given: hard_instance_nce(*given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x, teacher, targets), hard_instance_nce(x, teacher, targets))


def test_rejects():
    x, teacher, _ = views(4)
    with pytest.raises(
        ValueError, match=r"hard_instance_nce: both views must be \(B, D\) of one size, got \(4, 5\) and"
    ):
        hard_instance_nce(x, teacher[:3], torch.zeros(4))

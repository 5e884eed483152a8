# SPDX-License-Identifier: Apache-2.0
"""ICE's consistency of two views."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.consistency_kl import consistency_kl


def views(b, d=5, count=3):
    generator = torch.Generator().manual_seed(b)
    return torch.randn(count, b, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["ice_losses_many_proxies", "ice_losses_few_proxies"])
def test_golden(golden, name):
    """The features are the student's as they come; the published term holds its weight of 10."""
    file = golden(name)
    x, view, weak = (file.tensor(key) for key in ("inputs", "ema_inputs_view2", "ema_inputs_weak"))
    x.requires_grad_()
    loss = 10 * consistency_kl(x, view, weak)
    loss.backward()
    torch.testing.assert_close(loss.detach(), file.tensor("loss_kl"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, file.tensor("grad_kl"), rtol=1e-4, atol=2e-6)


def test_consistency_is_a_divergence():
    x, teacher, anchor = views(6)
    p = (F.normalize(x) @ F.normalize(teacher).T / 0.4).log_softmax(1)
    q = (F.normalize(anchor) @ F.normalize(anchor).T / 0.4).softmax(1)
    torch.testing.assert_close(consistency_kl(x, teacher, anchor), F.kl_div(p, q, reduction="batchmean"))
    assert consistency_kl(x, x, x).item() == pytest.approx(0, abs=1e-15)
    assert consistency_kl(x, teacher, anchor, temperature=1e-3) > 0


def test_gradients():
    x, teacher, anchor = (view.requires_grad_() for view in views(6))
    assert torch.autograd.gradcheck(lambda x: consistency_kl(x, teacher, anchor), (x,))
    consistency_kl(x, teacher, anchor).backward()
    assert teacher.grad is None
    assert anchor.grad is None


def test_nobody_there_and_half_precision():
    nobody = torch.zeros(0, 5, requires_grad=True)
    assert consistency_kl(nobody, nobody, nobody) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert consistency_kl(*views(4).half()).dtype == torch.float32


def test_rejects():
    with pytest.raises(ValueError, match="consistency_kl: temperature must be positive"):
        consistency_kl(*views(4), temperature=0)

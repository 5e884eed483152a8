# SPDX-License-Identifier: Apache-2.0
"""What holds for the gradient of every loss, op and memory alike: autocast leaves it alone, and it has a gradient."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u import batch_hard_triplet, cluster_nce, cosine_align, proxy_nce, segment_attention, segment_mean
from fastreid_u.memory import ClusterMemory, InstanceMemory, ProxyMemory
from fastreid_u.ops import device_flag
from fastreid_u.ops._cluster_nce import run_triton as cluster_kernel
from fastreid_u.ops.consistency_kl import consistency_kl
from fastreid_u.ops.hard_instance_nce import hard_instance_nce
from fastreid_u.ops.momentum_update import momentum_update_
from fastreid_u.ops.proxy_nce import _triton as proxy_kernel

DEFAULTS = dict(
    teacher=None, teacher_weight=None, teacher_temperature=None, smoothing=0.0, extra_target=None, extra_weight=None,
    focal=0.0, epsilon=0.0, class_mask=None, weight=None, temperature=0.05, normalize=True, ignore_index=-1,
    reduction="mean",
)  # fmt: skip
B, C, D = 12, 10, 16
generator = torch.Generator().manual_seed(0)
X, OTHER = torch.randn(2, B, D, generator=generator)
ROWS = F.normalize(torch.randn(C, D, generator=generator))
TARGETS, ID, EXTRA = torch.arange(B) % 5, torch.arange(C), torch.rand(B, C, generator=generator)


def cluster(**settings):
    return ClusterMemory.from_centroids(ROWS, **settings)


def instance():
    memory = InstanceMemory.from_features(ROWS)
    memory.set_labels(ID // 2)
    return memory


def proxy():
    return ProxyMemory.from_features(ROWS, ID % 5, ID // 5)


def soft(x):
    return cluster_nce(
        x, TARGETS, ROWS, teacher=OTHER, teacher_weight=0.3, smoothing=0.1, extra_target=EXTRA, extra_weight=0.2,
        focal=2,
    )  # fmt: skip


LOSSES = {
    "cluster_nce": lambda x: cluster_nce(x, TARGETS, ROWS),
    "cluster_nce, every part of the target": soft,
    "cluster_nce, epsilon": lambda x: cluster_nce(x, TARGETS, ROWS, epsilon=1e-6, class_mask=ID < 8),
    "proxy_nce": lambda x: proxy_nce(x, TARGETS, TARGETS % 2, ROWS, ID % 5, ID // 5, hard_negatives=3),
    "batch_hard_triplet": lambda x: batch_hard_triplet(x, TARGETS),
    "cosine_align": lambda x: cosine_align(x, OTHER),
    "consistency_kl": lambda x: consistency_kl(x, OTHER, OTHER.flip(0)),
    "hard_instance_nce": lambda x: hard_instance_nce(x, OTHER, TARGETS),
    "segment_attention": lambda x: (segment_attention(x, OTHER, TARGETS, heads=4) * EXTRA[:, :4]).sum(),
    "segment_mean": lambda x: segment_mean(x, TARGETS).square().sum(),
    "ClusterMemory.loss": lambda x: cluster().loss(x, TARGETS),
    "ClusterMemory": lambda x: cluster()(x, TARGETS),
    "ClusterMemory, hard": lambda x: cluster(use_hard=True)(x, TARGETS),
    "InstanceMemory.loss": lambda x: instance().loss(x, TARGETS),
    "InstanceMemory": lambda x: instance()(x, TARGETS),
    "ProxyMemory.loss": lambda x: proxy().loss(x, TARGETS),
    "ProxyMemory": lambda x: proxy()(x, TARGETS),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def value_and_gradient(loss, x=X):
    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", ["behind autocast", "under autocast"])
def test_autocast_changes_neither_a_loss_nor_its_gradient(loss, dtype, backward):
    expected, gradient = value_and_gradient(loss)
    leaf = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(leaf)
        if backward == "under autocast":
            value.backward()
    if backward == "behind autocast":
        value.backward()
    assert torch.equal(value, expected)
    assert torch.equal(leaf.grad, gradient)


def test_autocast_changes_no_gradient_to_a_memory_that_learns():
    found = []
    for enabled in (False, True):
        rows = ROWS.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            cluster_nce(X, TARGETS, rows).backward()
        found.append(rows.grad)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:momentum_update_. numba has no torch.float16, running the slow:RuntimeWarning")
@pytest.mark.parametrize("rule", ["sequential", "hard", "mean", "weighted", "row", "push", "push_sequential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_changes_no_update(rule, dtype, backend):
    found = []
    for enabled in (False, True):
        rows = ROWS.to(dtype)
        settings = {"weight_temperature": 0.1} if rule == "weighted" else {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            momentum_update_(rows, X, TARGETS, rule=rule, backend=backend, **settings)
        found.append(rows)
    assert torch.equal(*found)


def penalty(loss, x):
    """A loss and a penalty on the length of its gradient, as WGAN-GP has."""
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return ((gradient.norm(dim=1) - 1) ** 2).sum()


@every_loss
def test_a_penalty_on_the_gradient_has_the_gradient_of_its_finite_differences(loss):
    _, gradient = value_and_gradient(lambda x: penalty(loss, x), X.double())
    direction = F.normalize(torch.randn(B, D, generator=torch.Generator().manual_seed(1)).double(), dim=None)
    ends = [penalty(loss, (X.double() + step * direction).requires_grad_()) for step in (-1e-5, 1e-5)]
    assert ((ends[1] - ends[0]) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("make", [cluster, instance, proxy])
def test_the_second_derivative_of_one_call_is_that_of_the_loss_and_the_rows_move_once(make):
    leaves, memories = [X.clone().requires_grad_() for _ in range(2)], [make(), make()]
    for leaf, call in zip(leaves, (memories[0], memories[1].loss), strict=True):
        value = call(leaf, TARGETS)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        (value.detach() + ((gradient.norm(dim=1) - 1) ** 2).sum()).backward()
    memories[1].update_(X, TARGETS)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert torch.equal(memories[0].features, memories[1].features)


@pytest.mark.parametrize("make", [cluster, instance, proxy])
def test_a_step_of_the_loss_and_a_penalty_on_its_gradient_moves_the_rows_once(make):
    """Backward goes through the loss twice: for the gradient, and for the sum."""
    leaves, memories = [X.clone().requires_grad_() for _ in range(2)], [make(), make()]
    for leaf, call in zip(leaves, (memories[0], memories[1].loss), strict=True):
        value = call(leaf, TARGETS)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        (value + (gradient**2).sum()).backward(retain_graph=True)
        value.backward()
    memories[1].update_(X, TARGETS)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert torch.equal(memories[0].features, memories[1].features)


def test_a_second_derivative_by_rows_that_have_moved_is_refused():
    memory, x = cluster(), X.clone().requires_grad_()
    first, second = memory(x, TARGETS), memory(x, TARGETS)
    first.backward()
    with pytest.raises(RuntimeError, match="ClusterMemory: rows must not move between a loss and its second"):
        torch.autograd.grad(second, x, create_graph=True)


def test_several_losses_of_one_memory_in_one_backward_still_see_the_old_rows():
    memory, x = cluster(), X.clone().requires_grad_()
    (memory(x, TARGETS) + memory(x, TARGETS + 1)).backward()
    _, expected = value_and_gradient(lambda x: cluster().loss(x, TARGETS) + cluster().loss(x, TARGETS + 1))
    torch.testing.assert_close(x.grad, expected)


def test_a_second_derivative_through_a_kernel_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(device_flag, "_flags", {})
    ids = torch.zeros(B, dtype=torch.int64)
    camera = (TARGETS, ids, ROWS, ID % 5, torch.zeros(C, dtype=torch.int64))
    settings = dict(
        temperature=0.07, hard_negatives=3, scope="all", positives="all", normalize=True, ignore_index=-1,
        reduction="mean", compat=False,
    )  # fmt: skip
    for name, loss in (
        ("cluster_nce", lambda x: cluster_kernel(x, TARGETS, ROWS, **DEFAULTS)),
        ("proxy_nce", lambda x: proxy_kernel(x, *camera, **settings)),
    ):
        leaf = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}: backend must be 'reference' for a second derivative"):
            gradient.square().sum().backward()

# SPDX-License-Identifier: Apache-2.0
"""Group-wise BatchNorm against one torch BatchNorm per group, and the calibration of running statistics."""

import copy

import pytest
import torch
from torch import nn

from fastreid_u.models import GroupBatchNorm1d, GroupBatchNorm2d, calibrate_batchnorm, group_sizes, set_bn_group


def per_group(x, norms, sizes):
    """The definition: each group through a BatchNorm of its own."""
    return torch.cat([norm(chunk) for norm, chunk in zip(norms, x.split(sizes), strict=True)])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layers(dims, channels, group, running="first", dtype=torch.float64):
    """A torch BatchNorm with weights that are not 1 and 0, and a grouped one that holds the same."""
    plain = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(channels, dtype=dtype)
    nn.init.uniform_(plain.weight, 0.5, 2)
    nn.init.normal_(plain.bias)
    grouped = (GroupBatchNorm1d if dims == 1 else GroupBatchNorm2d)(channels, group, running, dtype=dtype)
    grouped.load_state_dict(plain.state_dict())
    return plain, grouped


@pytest.mark.parametrize(
    ("batch", "group", "sizes"),
    [
        (256, 64, [64] * 4),
        (16, 16, [16]),
        (5, 16, [5]),  # a batch of less than a group
        (33, 16, [16, 17]),  # a row left over joins the group before it
        (39, 16, [16, 23]),
        (40, 16, [16, 16, 8]),  # from half a group on it stands alone
        (3, 2, [3]),  # one row has no variance
        (4, 1, [1, 1, 1, 1]),
        (0, 16, [0]),
    ],
)
def test_group_sizes(batch, group, sizes):
    assert group_sizes(batch, group) == sizes
    assert sum(sizes) == batch


@pytest.mark.parametrize("running", ["first", "mean"])
@pytest.mark.parametrize(("dims", "shape"), [(1, (12, 5)), (1, (12, 5, 3)), (2, (12, 5, 4, 2)), (2, (15, 5, 4, 2))])
def test_equals_one_batchnorm_per_group(dims, shape, running):
    sizes = group_sizes(shape[0], 4)
    plain, grouped = layers(dims, 5, 4, running)
    norms = [copy.deepcopy(plain) for _ in sizes]
    weight = normal(*shape, seed=9)
    for step in range(3):
        x = (normal(*shape, seed=step) * 3 + 1).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, want = grouped(x), per_group(y, norms, sizes)
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
        (out * weight).sum().backward()
        (want * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)
    for name in ("weight", "bias"):
        total = sum(getattr(norm, name).grad for norm in norms)
        torch.testing.assert_close(getattr(grouped, name).grad, total, rtol=1e-8, atol=1e-10)
    kept = norms[:1] if running == "first" else norms
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(grouped, name), torch.stack([getattr(n, name) for n in kept]).mean(0))
    assert grouped.num_batches_tracked == 3


def test_groups_are_cut_in_batch_order():
    """Rows of the second group, moved and scaled, do not touch the first; and they change under plain BatchNorm."""
    plain, grouped = layers(2, 3, 4)
    x = normal(8, 3, 4, 4)
    moved = x.clone()
    moved[4:] = moved[4:] * 5 + 7
    torch.testing.assert_close(grouped(moved), grouped(x), rtol=1e-5, atol=1e-4)  # up to eps in the variance
    assert not torch.allclose(plain(moved), plain(x), rtol=0.1, atol=0.1)


def test_gradients_by_finite_differences():
    _, grouped = layers(2, 2, 3)
    x = normal(6, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(grouped, (x,))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_means_what_it_means_in_torch(momentum):
    plain, grouped = layers(1, 3, 4)
    plain.momentum = grouped.momentum = momentum
    for step in range(3):
        x = normal(8, 3, seed=step)
        grouped(x)
        plain(x[:4])
    torch.testing.assert_close(grouped.running_mean, plain.running_mean)
    torch.testing.assert_close(grouped.running_var, plain.running_var)


def test_eval_is_batchnorm():
    plain, grouped = layers(2, 3, 2)
    grouped(normal(8, 3, 4, 4))
    plain.load_state_dict(grouped.state_dict())
    x = normal(8, 3, 4, 4, seed=5)
    assert grouped.eval()(x).equal(plain.eval()(x))


def test_a_batch_of_one_group_is_batchnorm():
    plain, grouped = layers(2, 3, 8)
    x = normal(8, 3, 4, 4)
    assert grouped(x).equal(plain(x))
    assert grouped.running_var.equal(plain.running_var)


def test_without_weights_and_running_statistics():
    grouped = GroupBatchNorm2d(3, 4, affine=False, track_running_stats=False)
    x = normal(8, 3, 4, 4, dtype=torch.float32)
    out = grouped(x)
    torch.testing.assert_close(out[4:].mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    assert not grouped.state_dict()


def test_channels_last_and_autocast():
    """The layout survives, half precision does too, and the statistics stay in float32."""
    _, grouped = layers(2, 8, 4, dtype=torch.float32)
    reference = copy.deepcopy(grouped).double()
    x = normal(8, 8, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), reference(x.double()), rtol=2**-7, atol=2**-7)
    assert grouped.running_var.dtype == torch.float32
    torch.testing.assert_close(grouped.running_var.double(), reference.running_var, rtol=1e-5, atol=1e-6)


def test_a_lone_row_is_refused_by_the_neck():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GroupBatchNorm1d(3, 1)(torch.zeros(4, 3))


def test_compiles_without_a_graph_break():
    _, grouped = layers(2, 3, 4)
    twin = copy.deepcopy(grouped)
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
    x = normal(8, 3, 2, 2)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(grouped.running_mean, twin.running_mean)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Sequential(nn.BatchNorm1d(4 * 6 * 6))
    )


def test_set_bn_group_keeps_tensors_and_goes_both_ways(network):
    network[4][0].bias.requires_grad_(False)
    before = {name: id(p) for name, p in [*network.named_parameters(), *network.named_buffers()]}
    network[1].eval()
    set_bn_group(network, 4, "mean")
    assert type(network[1]) is GroupBatchNorm2d
    assert type(network[4][0]) is GroupBatchNorm1d
    assert (network[1].group_size, network[1].running) == (4, "mean")
    assert not network[1].training
    assert network[4].training
    set_bn_group(network, 2)
    assert (network[4][0].group_size, network[4][0].running) == (2, "first")
    assert before == {name: id(p) for name, p in [*network.named_parameters(), *network.named_buffers()]}
    assert not network[4][0].bias.requires_grad
    set_bn_group(network, None)
    assert type(network[1]) is nn.BatchNorm2d
    assert type(network[4][0]) is nn.BatchNorm1d
    assert before == {name: id(p) for name, p in [*network.named_parameters(), *network.named_buffers()]}


@pytest.mark.parametrize(
    ("group", "running", "message"),
    [(0, "first", "group must be at least 1"), (2.5, "first", "group must be an integer"), (4, "last", "running must")],
)
def test_set_bn_group_rejects(network, group, running, message):
    with pytest.raises((ValueError, TypeError), match=f"set_bn_group: {message}"):
        set_bn_group(network, group, running)
    assert type(network[1]) is nn.BatchNorm2d


def test_set_bn_group_refuses_what_it_cannot_replace(network):
    """A BatchNorm fused with its activation would lose the activation."""

    class BatchNormRelu(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    network.append(BatchNormRelu(3))
    with pytest.raises(ValueError, match=r"set_bn_group: model must .* got a BatchNormRelu"):
        set_bn_group(network, 4)
    assert type(network[1]) is nn.BatchNorm2d
    set_bn_group(network, None)  # nothing to do, so nothing to refuse
    assert type(network[-1]) is BatchNormRelu


@pytest.mark.parametrize("group", [None, 2])
def test_calibration_is_the_average_over_batches(network, group):
    set_bn_group(network, group)
    network[1].running_mean.fill_(3.0)  # stale
    network[1].num_batches_tracked.fill_(7)
    batches = [normal(6, 3, 8, 8, seed=i, dtype=torch.float32) for i in range(3)]
    weights = copy.deepcopy(list(network.parameters()))
    assert calibrate_batchnorm(network, iter(batches)) == 3
    maps = [network[0](x) for x in batches]
    torch.testing.assert_close(network[1].running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
    torch.testing.assert_close(network[1].running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0))
    # the layers above see what eval mode would normalise, not dropout
    flat = torch.stack([nn.functional.batch_norm(m, None, None, training=True).flatten(1).mean(0) for m in maps])
    torch.testing.assert_close(network[4][0].running_mean, flat.mean(0), rtol=1e-4, atol=1e-5)
    assert all(a.equal(b) for a, b in zip(weights, network.parameters(), strict=True))
    assert network[1].momentum == 0.1
    assert getattr(network[1], "group_size", None) == group
    assert all(module.training for module in network.modules())


def test_calibration_passes_over_batches_of_one_image(network):
    twin = copy.deepcopy(network)
    batch = normal(6, 3, 8, 8, dtype=torch.float32)
    assert calibrate_batchnorm(network, [batch[:1], batch, batch[5:]]) == 1
    calibrate_batchnorm(twin, [batch])
    assert network[1].running_mean.equal(twin[1].running_mean)


def test_calibration_restores_eval_mode_and_its_settings_after_an_error(network):
    set_bn_group(network, 2)
    network.eval()
    with pytest.raises(RuntimeError, match="196 elements"):  # images too large for the last layer
        calibrate_batchnorm(network, [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)])
    assert (network[1].momentum, network[1].group_size) == (0.1, 2)
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 3, 8, 8)]])
def test_calibration_without_a_batch_of_two_is_an_error(network, batches):
    before = network[1].running_var.fill_(3.0).clone()
    with pytest.raises(
        ValueError, match="calibrate_batchnorm: batches must hold a batch of at least 2 images, got none"
    ):
        calibrate_batchnorm(network, batches)
    assert network[1].running_var.equal(before)
    assert all(module.training for module in network.modules())

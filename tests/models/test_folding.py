# SPDX-License-Identifier: Apache-2.0
"""A folded copy gives the rows of the network, which stays as it was."""

import importlib.util

import pytest
import torch
from torch import nn

from fastreid_u.models import build_model
from fastreid_u.models.domains import domain, split_domains
from fastreid_u.models.folding import folded

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
NETWORKS = [
    pytest.param({"arch": "resnet10"}, id="resnet10"),
    pytest.param({"arch": "resnet10", "bn_group": 2}, id="grouped"),
    pytest.param({"arch": "resnet_ibn50a"}, id="ibn"),
    pytest.param({"arch": "timm/tf_efficientnet_lite0"}, id="efficientnet", marks=needs_timm),
    pytest.param({"arch": "timm/mobilenetv2_100"}, id="mobilenet", marks=needs_timm),
    pytest.param({"arch": "timm/vit_tiny_patch16_224"}, id="vit", marks=needs_timm),
]


def network(**options):
    """In eval mode, with statistics and weights that a BatchNorm has after training."""
    model = build_model(**options, weights=None, image_size=(64, 32), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.running_var, 0.5), (module.weight.data, 0.5), (module.running_mean, -0.2)):
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator) / 5)
    return model


def images(dtype=torch.float32):
    return torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(2)).to(dtype)


def batchnorms_that_work(model):
    return sum("forward" not in vars(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


@pytest.mark.parametrize("options", NETWORKS)
@torch.no_grad()
def test_same_rows_and_the_network_is_untouched(options):
    model = network(**options).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = folded(model, images(torch.float64))
    torch.testing.assert_close(copy(images(torch.float64)), model(images(torch.float64)), rtol=0, atol=1e-10)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_float32_rows_differ_by_rounding_only():
    model = network(arch="resnet10")
    copy = folded(model, images())
    torch.testing.assert_close(copy(images()), model(images()), rtol=0, atol=1e-5)
    assert batchnorms_that_work(copy) == 1  # the neck's, which follows the pooling
    assert batchnorms_that_work(model) == 13


@torch.no_grad()
def test_a_network_that_learned_is_folded_anew():
    model = network(arch="resnet10").double()
    first = folded(model, images(torch.float64))
    model.train()(images(torch.float64))
    model.eval().backbone.conv1.weight.mul_(1.5)
    second = folded(model, images(torch.float64))
    assert not torch.allclose(first(images(torch.float64)), second(images(torch.float64)), atol=1e-3)
    torch.testing.assert_close(second(images(torch.float64)), model(images(torch.float64)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["source", "target"])
@torch.no_grad()
def test_the_current_domain_is_folded(name):
    model = network(arch="resnet10").double()
    split_domains(model)
    with domain(model, "source"):
        model.train()(images(torch.float64))
    model.eval()
    with domain(model, name):
        expected = model(images(torch.float64))
        copy = folded(model, images(torch.float64))
        torch.testing.assert_close(copy(images(torch.float64)), expected, rtol=0, atol=1e-10)


class _ReadTwice(nn.Module):
    """What the convolution gives is read by more than its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return (self.norm(x) + x).mean(dim=(2, 3))


class _RunTwice(nn.Module):
    """One convolution, before two BatchNorms."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x)))).mean(dim=(2, 3))


class _WeightRead(nn.Module):
    """A convolution whose weight something else reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean(dim=(2, 3)) * self.conv.weight.norm()


class _TiedRead(nn.Module):
    """Two convolutions with one weight, which something else reads through the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.b.weight = self.a.weight
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.b(self.first(self.a(x)))).mean(dim=(2, 3)) * self.a.weight.norm()


class _Squeezes(nn.Module):
    """Gives (C,) for a batch of one image, which the second BatchNorm refuses."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.neck = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.neck(self.norm(self.conv(x)).mean(dim=(2, 3), keepdim=True).squeeze())


class _Empty(nn.Sequential):
    """False as a bool, as modules are that hold nothing yet."""

    def __len__(self):
        return 0


def _with_an_empty_part():
    return nn.Sequential(_Empty(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Flatten())


def _traced():
    return torch.fx.symbolic_trace(_ReadTwice())


def _compiled_part():
    return nn.Sequential(torch.compile(_ReadTwice(), backend="eager"), nn.Linear(4, 3), nn.BatchNorm1d(3))


KINDS = [_ReadTwice, _RunTwice, _WeightRead, _TiedRead, _Squeezes, _with_an_empty_part, _traced, _compiled_part]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_else_reads_a_layer_is_left_alone(kind):
    torch.manual_seed(0)
    model = kind().double()
    model(images(torch.float64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.3
    model.eval()
    expected = model(images(torch.float64))
    copy = folded(model, images(torch.float64))
    assert torch.equal(model(images(torch.float64)), expected)
    torch.testing.assert_close(copy(images(torch.float64)), expected, rtol=0, atol=1e-12)


class _Counts(nn.Module):
    """Counts images in a buffer and draws a number, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(len(x))
        return self.norm(self.conv(x)).mean(dim=(2, 3)) + torch.rand(())


@torch.no_grad()
def test_the_watched_run_leaves_no_trace():
    torch.manual_seed(0)
    model = _Counts().eval()
    draws = torch.get_rng_state()
    copy = folded(model, images())
    assert model.count == 0
    assert torch.equal(torch.get_rng_state(), draws)
    copy(images())
    assert model.count == 3  # by a copy as by the network itself


@torch.no_grad()
def test_a_hooked_layer_is_left_alone():
    model = network(arch="resnet10").double()
    model.backbone.conv1.register_forward_hook(lambda module, args, output: output * 2)
    copy = folded(model, images(torch.float64))
    torch.testing.assert_close(copy(images(torch.float64)), model(images(torch.float64)), rtol=0, atol=1e-10)


def test_refuses_training_mode():
    with pytest.raises(ValueError, match="folded: network must be in eval mode"):
        folded(build_model("resnet10", weights=None, seed=0), images())

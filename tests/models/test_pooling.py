# SPDX-License-Identifier: Apache-2.0
"""Pooling against its formula, in value and gradient."""

import pytest
import torch

from fastreid_u.models import GeM
from fastreid_u.models.pooling import make_pooling


def gem_formula(x, p, eps=1e-6):
    return x.clamp(min=eps).pow(p).mean((2, 3)).pow(1 / p)


@pytest.fixture
def feature_map():
    return torch.randn(4, 6, 8, 3, generator=torch.Generator().manual_seed(0))  # half of it below the floor


@pytest.mark.parametrize("p", [1.0, 3.0, 4.5])
def test_gem_equals_its_formula(feature_map, p):
    x = feature_map.double()
    torch.testing.assert_close(GeM(p).double()(x), gem_formula(x, p), rtol=1e-12, atol=0)


def test_gem_of_p_one_is_the_average_of_the_clamped_map(feature_map):
    torch.testing.assert_close(GeM(1.0)(feature_map), feature_map.clamp(min=1e-6).mean((2, 3)))


def test_gem_gradients_by_finite_differences():
    x = torch.rand(2, 3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    x[0, 0, 0, 0] = -1.0  # clamped, far from the kink
    x.requires_grad_()
    gem = GeM().double()
    names, values = zip(*gem.named_parameters(), strict=True)
    assert names == ("p",)

    def run(x, p):
        return torch.func.functional_call(gem, {"p": p}, (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_gem_gradients_equal_those_of_the_formula(feature_map):
    """The division by the maximum is invisible to autograd: dx and dp are those of the plain formula."""
    weight = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = feature_map.double().requires_grad_(), feature_map.double().requires_grad_()
    gem, p = GeM().double(), torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
    (gem(ours) * weight).sum().backward()
    (gem_formula(theirs, p) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gem.p.grad, p.grad, rtol=1e-10, atol=1e-14)


def test_gem_passes_no_gradient_to_clamped_entries(feature_map):
    x = feature_map.requires_grad_()
    GeM()(x).sum().backward()
    assert (x.grad[x < 1e-6] == 0).all()
    assert (x.grad[x > 0.1] > 0).all()


@pytest.mark.parametrize("p", [3.0, 8.0, 40.0])
def test_gem_stays_finite_where_powers_leave_float32(p):
    """A dead channel (all below the floor) and a very active one: 1e-6^8 is 0 and 100^40 infinite in float32."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, 1] = 100.0
    x.requires_grad_()
    gem = GeM(p)
    y = gem(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[1e-6, 100.0]]))
    assert x.grad.isfinite().all()
    assert gem.p.grad.isfinite().all()


@pytest.mark.parametrize("name", ["gem", "avg", "max"])
def test_half_precision_is_pooled_in_float32(feature_map, name):
    x = feature_map.abs().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = make_pooling(name)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), make_pooling(name).double()(x.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gem", "avg", "max"])
def test_memory_format_does_not_matter(feature_map, name):
    pool = make_pooling(name)
    last = feature_map.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pool(last), pool(feature_map))


def test_average_and_maximum(feature_map):
    rows = feature_map.flatten(2)
    torch.testing.assert_close(make_pooling("avg")(feature_map), rows.mean(2))
    assert make_pooling("max")(feature_map).equal(rows.amax(2))


@pytest.mark.parametrize("wrong", [{"p": 0}, {"p": -1.0}, {"eps": 0.0}])
def test_gem_rejects(wrong):
    with pytest.raises(ValueError, match=r"GeM: .* must be positive"):
        GeM(**wrong)


def test_unknown_pooling_lists_the_known():
    with pytest.raises(ValueError, match="build_model: pooling must be one of 'gem', 'avg', 'max', got 'mean'"):
        make_pooling("mean")

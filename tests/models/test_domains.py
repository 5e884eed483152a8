# SPDX-License-Identifier: Apache-2.0
"""Domain-specific BatchNorm: shared weights, separate statistics."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.models import build_model
from fastreid_u.models.domains import DomainNorm, domain, single_domain, split_domains


@pytest.fixture
def network():
    model = build_model("resnet10", weights=None, pooling="avg", seed=0)
    split_domains(model)
    return model


def images(number, shift=0.0):
    return torch.randn(8, 3, 32, 16, generator=torch.Generator().manual_seed(number)) + shift


def test_each_batchnorm_becomes_a_pair_and_a_frozen_bias_stays_frozen(network):
    plain = build_model("resnet10", weights=None, pooling="avg", seed=0)
    norms = [m for m in plain.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    pairs = [m for m in network.modules() if isinstance(m, DomainNorm)]
    assert len(pairs) == len(norms)
    assert all(torch.equal(pair.source.weight, pair.target.weight) for pair in pairs)
    assert all(pair.source.weight is not pair.target.weight for pair in pairs)
    assert not network.bnneck.source.bias.requires_grad
    assert not network.bnneck.target.bias.requires_grad


def test_a_domain_moves_only_its_own_statistics(network):
    twin = build_model("resnet10", weights=None, pooling="avg", seed=0)
    with domain(network, "source"):
        network(images(0, shift=3.0))
    torch.testing.assert_close(network.backbone.bn1.target.running_mean, torch.zeros(32))
    assert network.backbone.bn1.source.running_mean.abs().max() > 0
    network(images(1))  # outside the block it is the target again
    twin(images(1))
    torch.testing.assert_close(network.backbone.bn1.target.running_mean, twin.backbone.bn1.running_mean)


def test_the_block_ends_even_when_it_fails(network):
    with pytest.raises(RuntimeError, match="boom"), domain(network, "source"):
        raise RuntimeError("boom")
    assert network.bnneck.domain == "target"
    with pytest.raises(ValueError, match="name must be one of 'source', 'target'"), domain(network, "sauce"):
        pass


def test_what_is_saved_is_an_ordinary_network(network):
    with domain(network, "source"):
        network(images(0, shift=3.0))
    network(images(1))
    network.eval()
    for name in ("source", "target"):
        plain = single_domain(network, name)
        assert plain.state_dict().keys() == build_model("resnet10", weights=None, pooling="avg").state_dict().keys()
        with domain(network, name):
            torch.testing.assert_close(plain(images(2)), network(images(2)))
    assert F.cosine_similarity(single_domain(network, "source")(images(2)), network(images(2))).min() < 0.9999

# SPDX-License-Identifier: Apache-2.0
"""Kept features are those of the same network in the same state, or none."""

import torch

from fastreid_u.engine.reuse import KeptFeatures
from fastreid_u.models.domains import domain, split_domains


def network():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))


def kept(model):
    features = KeptFeatures()
    features.keep(model, torch.ones(2, 3))
    return features


def test_features_are_handed_out_once():
    model = network()
    features = kept(model)
    assert torch.equal(features.take(model), torch.ones(2, 3))
    assert features.take(model) is None


def test_another_network_with_the_same_weights_has_none():
    assert kept(network()).take(network()) is None


def test_training_mode_is_no_change_but_weights_statistics_and_domains_are():
    model = network()
    split_domains(model)
    assert kept(model.train()).take(model.eval()) is not None
    features = kept(model)
    with domain(model, "source"):
        assert features.take(model) is None
    model[0].weight.data[0, 0] += 1
    assert features.take(model) is None
    features = kept(model)
    model[1].target.running_mean[0] += 1
    assert features.take(model) is None

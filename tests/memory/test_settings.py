# SPDX-License-Identifier: Apache-2.0
"""Settings of a memory that cannot be: a named error where they are given, before any step."""

import pytest
import torch

from fastreid_u.memory import ClusterMemory, InstanceMemory, ProxyMemory

MEMORIES = ClusterMemory, InstanceMemory, ProxyMemory
EVERY = {
    "num_features": [("a", "must be an integer, got 'a'"), (0, "must be at least 1, got 0")],
    "temp": [(0, "must be positive and finite, got 0"), (None, "must be a real number, got None")],
    "momentum": [(2, r"must lie in \[0, 1\], got 2"), (float("nan"), r"must lie in \[0, 1\], got nan")],
}
NORMALIZE = {"normalize": [("x", "must be True or False, got 'x'")]}
OWN = {
    ClusterMemory: NORMALIZE
    | {
        "use_hard": [("x", "must be True or False, got 'x'")],
        "rule": [("foo", "must be one of 'sequential', .*, got 'foo'"), ("", "must be one of .*, got ''")],
        "weight_temperature": [(0, r"must lie in \(0, inf\], got 0"), ("x", "must be a real number, got 'x'")],
        "push_weight": [(-1, r"must lie in \[0, inf\), got -1")],
    },
    InstanceMemory: NORMALIZE
    | {
        "num_source_classes": [(-1, "must be at least 0, got -1"), (1.5, "must be an integer, got 1.5")],
        "epsilon": [(1, r"must lie in \[0, 1\), got 1")],
    },
    ProxyMemory: {
        "intra_weight": [(-1, r"must lie in \[0, inf\), got -1")],
        "inter_weight": [(float("inf"), r"must lie in \[0, inf\), got inf")],
        "hard_negatives": [(-1, "must be at least 1, got -1"), (2.5, "must be an integer, got 2.5")],
        "positives": [("x", "must be one of 'all', 'other_cameras', got 'x'")],
        "reduction": [("x", "must be one of 'mean', 'camera', 'sum', 'none', got 'x'")],
        "compat": [(None, "must be True or False, got None")],
    },
}
CASES = [
    (memory, name, value, rule)
    for memory in MEMORIES
    for name, values in (EVERY | OWN[memory]).items()
    for value, rule in values
]


@pytest.mark.parametrize(("memory", "name", "value", "rule"), CASES)
def test_a_setting_that_cannot_be_is_refused_where_it_is_given_and_where_it_is_assigned(memory, name, value, rule):
    made = memory(4, 3)
    before = getattr(made, name)
    for give in (
        lambda: memory(**{"num_features": 4, name: value}, **rows(memory)),
        lambda: setattr(made, name, value),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{memory.__name__}: {name} {rule}$"):
            give()
    assert getattr(made, name) == before


def rows(memory, number=3):
    return {"num_proxies" if memory is ProxyMemory else "num_samples": number}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("number", "rule"), [(-1, "must be at least 0, got -1"), (3.0, "must be an integer, got 3.0")])
def test_a_number_of_rows_that_cannot_be_is_refused(memory, number, rule):
    (name,) = rows(memory)
    with pytest.raises((TypeError, ValueError), match=f"^{memory.__name__}: {name} {rule}"):
        memory(4, **rows(memory, number))


def test_settings_at_the_ends_of_their_ranges_are_taken():
    memory = ClusterMemory(4, 0, 1, 1, rule="weighted", weight_temperature=float("inf"), push_weight=0)
    memory.momentum, memory.weight_temperature, memory.rule = 0, None, "mean"
    assert (memory.momentum, memory.rule) == (0, "mean")
    assert ProxyMemory(4, 0, hard_negatives=None, intra_weight=0).hard_negatives is None


def test_a_loss_without_a_proxy_is_refused_by_name():
    """As where all images are outliers."""
    memory = ProxyMemory.from_features(torch.ones(2, 4), [-1, -1], [0, 0])
    for call in (memory.loss, memory):
        with pytest.raises(ValueError, match="ProxyMemory: features must have at least one row before the first loss"):
            call(torch.ones(2, 4, requires_grad=True), [-1, -1])
    memory.update_(torch.ones(2, 4), [-1, -1])
    memory.restart(torch.ones(2, 4), [0, 1], [0, 0])
    assert memory.loss(torch.ones(2, 4), [-1, -1]) == 0

# SPDX-License-Identifier: Apache-2.0
"""What code written for the published classes does with a memory: sets its attributes, leaves rows unnormalised."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_u.memory import ClusterMemory, InstanceMemory, ProxyMemory

generator = torch.Generator().manual_seed(0)
X, ROWS, OTHER = (torch.randn(n, 8, generator=generator) for n in (4, 10, 10))
INDEX, LABELS, LATER = torch.tensor([0, 3, 5, 9]), torch.arange(10) // 2, torch.arange(10) % 3


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
}
MEMORIES = {
    "cluster": lambda rows, labels: ClusterMemory.from_centroids(rows),
    "instance": lambda rows, labels: instance(labels, rows),
    "proxy": lambda rows, labels: ProxyMemory.from_features(rows, labels, labels % 2),
}


def instance(labels, rows=ROWS, **settings):
    memory = InstanceMemory.from_features(rows, **settings)
    memory.set_labels(labels)
    return memory


def same(memory, expected):
    same_as(memory, expected)
    assert torch.equal(memory.loss(X, INDEX), expected.loss(X, INDEX))


def same_as(memory, expected):
    for name, buffer in expected.named_buffers():
        assert torch.equal(getattr(memory, name), buffer), name


@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
def test_labels_that_are_assigned_make_the_clusters_anew(kind):
    memory = instance(LABELS)
    memory.labels = kind(LATER)
    same(memory, instance(LATER))
    assert isinstance(memory.labels, torch.Tensor)
    assert memory.labels.dtype == torch.int64


def test_features_that_are_assigned_make_the_clusters_anew():
    memory, rows = instance(LABELS), F.normalize(OTHER, dim=1)
    memory.features = rows
    same(memory, instance(LABELS, OTHER))
    assert memory.features is rows


def test_both_may_be_assigned_in_either_order_and_to_another_number_of_rows():
    memory = InstanceMemory(8, 0)
    memory.features = F.normalize(ROWS, dim=1)
    with pytest.raises(ValueError, match="labels must be set before the first loss"):
        memory.loss(X, INDEX)
    memory.labels = LABELS
    same(memory, instance(LABELS))
    memory.labels = LATER
    memory.features = F.normalize(OTHER, dim=1)
    same(memory, instance(LATER, OTHER))


def test_assigned_labels_are_those_of_all_rows_source_classes_included():
    memory = InstanceMemory.from_features(ROWS[2:], source_centroids=ROWS[:2])
    memory.labels = torch.cat([torch.arange(2), LABELS[2:] + 2])
    expected = InstanceMemory.from_features(ROWS[2:], source_centroids=ROWS[:2])
    expected.set_labels(LABELS[2:])
    same(memory, expected)


def test_a_memory_goes_on_from_a_state_behind_assignments():
    memory, other = instance(LABELS), InstanceMemory(8, 3)
    memory.labels = LATER
    memory.update_(X, INDEX)
    other.load_state_dict(memory.state_dict())
    same(other, memory)


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        (LABELS[:4], r"one entry for each row of features \(10\), got 4"),
        (LABELS.float(), "labels must hold integers, got torch.float32"),
        (LABELS - 3, r"labels must lie in \[0, 100100\), got -3"),
        (torch.where(LABELS == 0, 2**31 - 1, LABELS), r"labels must lie in \[0, 100100\), got 2147483647"),
    ],
    ids=["another length", "fractions", "below -1", "noise as the largest int32"],
)
@pytest.mark.parametrize("form", ["assigned", "set_labels"])
def test_labels_that_cannot_be_are_refused_and_the_old_stay(labels, rule, form):
    memory = instance(LABELS)
    with pytest.raises((TypeError, ValueError), match="InstanceMemory.*" + rule.replace("features ", ".*")):
        setattr(memory, "labels", labels) if form == "assigned" else memory.set_labels(labels)
    same(memory, instance(LABELS))


ROWS_THAT_CANNOT_BE = {
    "NaN": (OTHER / 0.0 * 0.0, ValueError, "features must be finite, got NaN or infinity in 10 of 10 rows"),
    "none": (None, TypeError, "features must be a tensor, got NoneType"),
    "integers": (OTHER.long(), TypeError, "features must be floating point, got torch.int64"),
    "another width": (OTHER[:, :7], ValueError, "features must have 8 columns, as num_features, got 7"),
    "one dimension": (OTHER[0], ValueError, r"features must be 2-D, got shape \(8,\)"),
    "one row, expanded": (OTHER[:1].expand(10, 8), ValueError, "features must have memory of its own for each number"),
    "trained": (OTHER.clone().requires_grad_(), ValueError, "features must not require grad"),
}


@pytest.mark.parametrize("case", ROWS_THAT_CANNOT_BE)
@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_features_that_cannot_be_rows_are_refused_and_the_old_stay(make, case):
    memory, (rows, kind, rule) = make(ROWS, LABELS), ROWS_THAT_CANNOT_BE[case]
    with pytest.raises(kind, match=f"^{type(memory).__name__}: {rule}"):
        memory.features = rows
    same_as(memory, make(ROWS, LABELS))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("features", OTHER[:4], "features must have 10 rows, a proxy each, got 4"),
        ("clusters", None, "clusters must be a tensor"),
        ("clusters", LABELS[:4], r"clusters must have one entry for each row of features \(10\), got 4"),
        ("cameras", LABELS.float(), "cameras must hold integers"),
        ("cameras", LABELS - 1, r"cameras must lie in \[0, 2147483648\), got -1"),
    ],
)
def test_rows_of_a_proxy_memory_stay_of_one_number(name, value, rule):
    memory = ProxyMemory.from_features(ROWS, torch.arange(10), LABELS)
    with pytest.raises((TypeError, ValueError), match=f"^ProxyMemory: {rule}"):
        setattr(memory, name, value)
    same_as(memory, ProxyMemory.from_features(ROWS, torch.arange(10), LABELS))


@pytest.mark.parametrize("make", [MEMORIES["cluster"], MEMORIES["instance"]])
def test_a_tensor_that_is_assigned_is_the_one_that_moves(make):
    memory, rows = make(ROWS, LABELS), F.normalize(OTHER, dim=1)[:6]
    memory.features, before = rows, rows.clone()
    memory.update_(X[:2], [0, 5])
    assert memory.features is rows
    assert (rows != before).any(dim=1).tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_features_of_inference_mode_and_parameters_become_rows_that_move(make):
    memory = make(ROWS, torch.arange(10))
    with torch.inference_mode():
        memory.features = OTHER * 1
    memory.update_(X, INDEX)
    memory.features = torch.nn.Parameter(OTHER.clone(), requires_grad=False)
    memory.update_(X, INDEX)
    assert "features" in memory.state_dict()
    assert not list(memory.parameters())


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize(
    ("value", "rule"), [(ROWS / 0.0 * 0.0, "must be finite, got NaN or infinity"), (None, "must be a tensor, got None")]
)
def test_a_state_whose_features_cannot_be_rows_is_refused_and_the_old_stay(make, value, rule):
    memory = make(ROWS, LABELS)
    with pytest.raises(RuntimeError, match=f"{type(memory).__name__}.load_state_dict: features {rule}"):
        memory.load_state_dict(
            memory.state_dict() | {"features": value if value is None else value[: len(memory.features)]}
        )
    same_as(memory, make(ROWS, LABELS))


@pytest.mark.parametrize("change", [{"labels": torch.arange(10)}, {"cluster_means": OTHER[:4]}])
def test_a_state_whose_means_are_of_other_clusters_is_refused(change):
    memory = instance(LABELS)
    with pytest.raises(RuntimeError, match=r"cluster_means must have a row for each of (10|5) labels, got (5|4)"):
        memory.load_state_dict(memory.state_dict() | change)
    same(memory, instance(LABELS))


def test_proxies_are_found_in_any_order_that_is_assigned():
    memory = ProxyMemory.from_features(ROWS, torch.arange(10), LABELS)
    memory.clusters, memory.cameras = torch.arange(10).flip(0), LABELS.flip(0)
    assert memory.rows(torch.arange(10), LABELS).tolist() == list(range(9, -1, -1))
    assert memory.rows([3, 3, 11], [1, 2, 0]).tolist() == [6, -1, -1]


@pytest.mark.parametrize(("make", "name"), [("instance", "labels"), ("proxy", "clusters"), ("proxy", "cameras")])
def test_a_state_whose_ids_cannot_be_is_refused(make, name):
    memory = MEMORIES[make](ROWS, LABELS)
    state = memory.state_dict()
    state[name] = torch.where(state[name] == 0, -7, state[name])
    with pytest.raises(RuntimeError, match=rf"load_state_dict: {name} must lie in \[0, "):
        memory.load_state_dict(state)
    same_as(memory, MEMORIES[make](ROWS, LABELS))


@pytest.mark.parametrize(
    "make", [lambda **s: ClusterMemory.from_centroids(ROWS, **s), lambda **s: instance(LABELS, **s)]
)
def test_normalize_holds_for_loss_and_update_alike(make):
    """Given to the memory, or to one call."""
    apart, always, once = make(), make(normalize=False), make()
    expected = apart.loss(X, INDEX, normalize=False)
    apart.update_(X, INDEX, normalize=False)
    losses = [
        memory(X.clone().requires_grad_(), INDEX, **s) for memory, s in ((always, {}), (once, {"normalize": False}))
    ]
    for memory, loss in zip((always, once), losses, strict=True):
        loss.backward()
        assert torch.equal(loss.detach(), expected)
        assert torch.equal(memory.features, apart.features)
    normalised = make()
    normalised.update_(X, INDEX)
    assert not torch.allclose(normalised.features, apart.features)
    make(normalize=False).loss(X, INDEX).item()


@pytest.mark.parametrize("make", [lambda: ClusterMemory.from_centroids(ROWS), lambda: instance(LABELS)])
def test_a_setting_of_the_memory_may_be_another_for_one_loss(make):
    warm = make()
    warm.temp = 0.5
    assert torch.equal(make().loss(X, INDEX, temperature=0.5), warm.loss(X, INDEX))


def test_use_hard_may_be_changed_as_the_published_class_reads_it_at_each_call():
    hard, memory = ClusterMemory.from_centroids(ROWS, use_hard=True), ClusterMemory.from_centroids(ROWS)
    memory.use_hard = True
    for each in (hard, memory):
        each.update_(X, [1, 1, 1, 2])
    assert torch.equal(hard.features, memory.features)
    memory.use_hard = False
    assert (memory.rule, memory.use_hard) == ("sequential", False)
    with pytest.raises(ValueError, match="use_hard must be False with rule='push', got True"):
        ClusterMemory(8, 10, rule="push").use_hard = True


def test_labels_of_numpy_and_any_integer_type_are_taken():
    for labels in (LATER.numpy().astype(np.uint16), LATER.to(torch.int8), tuple(LATER.tolist())):
        same(instance(labels), instance(LATER))


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("setting", ["default device", "inference mode", "deterministic algorithms"])
def test_a_memory_that_is_made_under_a_global_setting_of_torch_trains_as_any(make, setting):
    """A default device that the inputs are not on, features and labels of inference mode, ..."""
    found = []
    for settings in (contextlib.nullcontext, SETTINGS[setting]):
        with settings():
            memory, targets = make(ROWS * 1, LABELS * 1), INDEX // 2
        x = X.clone().requires_grad_()
        with SETTINGS[setting]() if setting == "deterministic algorithms" else contextlib.nullcontext():
            memory(x, targets).backward()
        memory.update_(X, targets)
        found.append((x.grad, *memory.buffers()))
    for each, expected in zip(*found, strict=True):
        assert torch.equal(each, expected)

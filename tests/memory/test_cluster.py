# SPDX-License-Identifier: Apache-2.0
"""ClusterMemory against the published class: loss, gradient, rows after one step and ten, in both of its forms.

And what all memories take in: arrays, any integers, features with a graph.
"""

import copy

import numpy as np
import pytest
import torch

from fastreid_u import ClusterMemory, InstanceMemory, ProxyMemory

FILES = ["cm_one_b64_d96_k40", "cm_random_b50_d48_k23"]
SETTINGS = [(0.05, 0.1), (0.05, 0.2), (0.05, 0.9), (0.1, 0.2)]


def make(golden_case, temp, momentum, use_hard):
    rows = torch.from_numpy(golden_case["features_before"])
    memory = ClusterMemory(rows.shape[1], rows.shape[0], temp=temp, momentum=momentum, use_hard=use_hard)
    memory.features.copy_(rows)
    return memory


@pytest.mark.parametrize("use_hard", [False, True])
@pytest.mark.parametrize(("temp", "momentum"), SETTINGS)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["one call", "apart"])
def test_equals_the_published_class(golden, name, temp, momentum, use_hard, form):
    case = golden(name)
    tag = f"{'hard' if use_hard else 'cm'}_t{temp}_m{momentum}"
    memory = make(case, temp, momentum, use_hard)
    x = torch.from_numpy(case["inputs"]).requires_grad_()
    targets = torch.from_numpy(case["targets"])
    if form == "one call":
        loss = memory(x, targets)
        torch.testing.assert_close(memory.features, torch.from_numpy(case["features_before"]), rtol=0, atol=0)
        loss.backward()
    else:
        loss = memory.loss(x, targets)
        loss.backward()
        memory.update_(x, targets)
    torch.testing.assert_close(loss.detach(), torch.tensor(case[f"loss_{tag}"].item()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, torch.from_numpy(case[f"grad_{tag}"]), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(memory.features, torch.from_numpy(case[f"features_after_{tag}"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_hard", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.2, 0.9])
def test_ten_steps_equal_the_published_trajectory(golden, momentum, use_hard):
    case = golden("cm_trajectory_b32_d64_k24")
    tag = f"{'hard' if use_hard else 'cm'}_m{momentum}"
    memory = make(case, 0.05, momentum, use_hard)
    stored = dict(zip((1, 2, 3, 5, 10), case[f"features_each_step_{tag}"], strict=True))
    for step in range(10):
        x = torch.from_numpy(case["inputs"][step]).requires_grad_()
        loss = memory(x, torch.from_numpy(case["targets"][step]))
        loss.backward()
        assert loss.item() == pytest.approx(case[f"loss_{tag}"][step].item(), rel=1e-5, abs=1e-6)
        if step + 1 in stored:
            torch.testing.assert_close(memory.features, torch.from_numpy(stored[step + 1]), rtol=0, atol=5e-6)
    torch.testing.assert_close(x.grad, torch.from_numpy(case[f"grad_last_{tag}"]), rtol=1e-4, atol=2e-6)


def test_no_update_without_gradients():
    memory = ClusterMemory.from_centroids(torch.eye(3))
    before = memory.features.clone()
    memory(torch.rand(4, 3), torch.tensor([0, 1, 2, 0]))
    with torch.no_grad():
        memory(torch.rand(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(memory.features, before)


def test_two_calls_before_one_backward_both_see_the_old_rows():
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    targets = torch.tensor([0, 1, 1, 4])
    batches = torch.randn(2, 4, 8)
    apart = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        ClusterMemory.from_centroids(rows)(x, targets).backward()
        apart.append(x.grad)
    memory = ClusterMemory.from_centroids(rows)
    x, y = (batch.clone().requires_grad_() for batch in batches)
    (memory(x, targets) + memory(y, targets)).backward()
    torch.testing.assert_close(torch.stack([x.grad, y.grad]), torch.stack(apart))


def test_one_call_copies_no_memory(torch_calls):
    """A million rows must not be copied for a batch of four."""
    memory = ClusterMemory.from_centroids(torch.randn(500, 64))
    x, targets = torch.randn(4, 64, requires_grad=True), torch.tensor([0, 1, 1, 4])
    rows = memory.features.data_ptr()
    with torch_calls() as calls:
        memory(x, targets).backward()
    assert memory.features.data_ptr() == rows
    assert 4 * 500 * 4 <= calls.largest < memory.features.nbytes  # logits, but no rows


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_one_call_in_half_precision_loses_no_small_gradient(scale):
    """A gradient scaler multiplies the loss so that half precision holds the gradient: it must not be cut before."""
    torch.manual_seed(0)
    memory = ClusterMemory.from_centroids(torch.randn(5, 64), momentum=1.0)
    x, targets = torch.randn(4, 64).half(), torch.tensor([0, 1, 1, 4])
    grads = []
    for run in (memory, memory.loss):
        leaf = x.clone().requires_grad_()
        (run(leaf, targets) * 1e-6 * scale).backward()
        assert leaf.grad.dtype == torch.float16
        grads.append(leaf.grad.float())
    torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-7)
    assert (grads[0].abs().sum() > 0.01) == (scale > 1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_call_compiles_whole(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    rows, batch, targets = torch.randn(5, 8), torch.randn(4, 8), torch.tensor([0, 1, -1, 1])
    results = []
    for compiled in (False, True):
        memory = ClusterMemory.from_centroids(rows, rule="push")
        x = batch.clone().requires_grad_()
        run = torch.compile(memory, backend=backend, fullgraph=True) if compiled else memory
        loss = run(x, targets)
        loss.backward()
        results.append((loss.detach(), x.grad, memory.features))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert not torch.equal(results[1][2], torch.nn.functional.normalize(rows))


DCCC = {"wgm_tau0.03_s0.3_m0.1": ("weighted", 0.03), "wgm_tau0.6_s0.1_m0.1": ("weighted", 0.6)}
DCCC |= {"hard_tau0.09_s0.1_m0.2": ("hard", None), "avg_tau0.09_s0.1_m0.2": ("mean", None)}


@pytest.mark.parametrize("tag", DCCC)
def test_a_teacher_and_another_rule_equal_the_published_dccc(golden, tag):
    case = golden("dccc_memory_b48_d64_k30")
    (rule, weight_temperature), (share, momentum) = DCCC[tag], (float(part[1:]) for part in tag.split("_")[2:])
    rows = case.tensor("features_before")
    memory = ClusterMemory(64, 30, momentum=momentum, rule=rule, weight_temperature=weight_temperature)
    memory.features.copy_(rows)
    x = case.tensor("inputs").requires_grad_()
    loss = memory(x, case.tensor("targets"), teacher=case.tensor("inputs_ema"), teacher_weight=share)
    loss.backward()
    torch.testing.assert_close(loss.detach(), case.tensor(f"loss_s_{tag}"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, case.tensor(f"grad_s_{tag}"), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(memory.features, case.tensor(f"features_after_{tag}"), rtol=0, atol=1e-6)


def test_a_loss_per_sample_goes_back_per_sample():
    memory = ClusterMemory.from_centroids(torch.eye(3), momentum=1.0)
    targets, upstream = torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 0.0, 2.0, -1.0])
    batch, grads = torch.rand(4, 3), []
    for run in (memory, memory.loss):
        x = batch.clone().requires_grad_()
        run(x, targets, reduction="none").backward(upstream)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_index_is_for_two_calls():
    memory = ClusterMemory.from_centroids(torch.eye(3), rule="index", momentum=0.0)
    x, targets = torch.eye(3)[[1, 2]], torch.tensor([0, 0])
    with pytest.raises(ValueError, match="ClusterMemory: rule must not be 'index' in one call"):
        memory(x.requires_grad_(), targets)
    memory.update_(x, targets, index=torch.tensor([1, -1, -1]))
    assert memory.features.tolist() == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_all_state_is_in_the_state_dict():
    memory = ClusterMemory.from_centroids(torch.randn(5, 8), temp=0.1)
    other = ClusterMemory(8, 5)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.features, memory.features)
    torch.testing.assert_close(memory.features.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("rows", [0, 5, 9])
def test_restart_is_a_new_memory_of_any_number_of_rows(rows):
    centroids = torch.randn(5, 8)
    memory = ClusterMemory(8, rows, temp=0.3)
    memory.restart(centroids.clone().requires_grad_())
    assert torch.equal(memory.features, ClusterMemory.from_centroids(centroids).features)
    assert not memory.features.requires_grad
    assert (memory.num_samples, memory.temp) == (5, 0.3)
    memory.double().restart(centroids)
    assert memory.features.dtype == torch.float64
    with pytest.raises(ValueError, match=r"ClusterMemory\.restart: centroids must have 8 columns like features, got 7"):
        memory.restart(centroids[:, :7])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temp": 0.0}, "temp"),
        ({"momentum": 1.1}, "momentum"),
        ({"rule": "row"}, "rule"),
        ({"rule": "mean", "use_hard": True}, "rule"),
    ],
)
def test_refuses(settings, name):
    with pytest.raises(ValueError, match=f"ClusterMemory: {name} must"):
        ClusterMemory(8, 4, **settings)


LABELS = [0, 1, 2, 0, 1, 2]
READ_ONLY = np.array(LABELS)
READ_ONLY.flags.writeable = False
KINDS = {
    **{
        str(dtype): torch.tensor(LABELS, dtype=dtype)
        for dtype in (torch.uint8, torch.int16, torch.uint16, torch.uint64)
    },
    "list": LABELS,
    "int32 array": np.array(LABELS, np.int32),
    "big-endian": np.array(LABELS, ">i8"),
    "reversed": np.array(LABELS[::-1])[::-1],
    "read-only": READ_ONLY,
}


def every_memory(features, labels=LABELS):
    """One of each kind, of 6 rows of 4."""
    instance = InstanceMemory.from_features(features)
    instance.set_labels(labels)
    return {
        "cluster": ClusterMemory.from_centroids(features),
        "instance": instance,
        "proxy": ProxyMemory.from_features(features, labels, [0, 0, 0, 1, 1, 1]),
    }


def features_and_batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("samples", [6, 4], ids=["as many samples as rows", "fewer"])
@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["cluster", "instance", "proxy"])
def test_takes_integers_of_any_kind(name, given, samples):
    features, x = features_and_batch()
    results = []
    for ids in (torch.tensor(LABELS), given):
        memory = every_memory(features, ids)[name]
        leaf = x[:samples].clone().requires_grad_()
        loss = memory(leaf, ids[:samples])
        loss.backward()
        memory.update_(leaf, ids[:samples])
        results.append((loss.detach(), memory.loss(leaf, ids[:samples]).detach(), leaf.grad, *memory.buffers()))
    torch.testing.assert_close(*results)
    if name == "proxy":
        assert memory.rows(given, given).tolist() == memory.rows(torch.tensor(LABELS), torch.tensor(LABELS)).tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["cluster", "instance", "proxy"])
def test_takes_features_as_an_array_or_with_a_graph(name):
    features, x = features_and_batch()
    results = []
    for rows, batch in ((features, x), (features.numpy(), x.numpy()), (features.clone().requires_grad_(), x)):
        memory = every_memory(rows)[name]
        assert not memory.features.requires_grad
        loss = memory(batch, LABELS)
        memory.update_(batch, LABELS)
        memory(x.clone().requires_grad_(), LABELS).backward()
        results.append((loss, *memory.buffers()))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_are_float32_whatever_the_default(dtype):
    features, _ = features_and_batch()
    torch.set_default_dtype(dtype)
    try:
        memories = [ClusterMemory(4, 3), InstanceMemory(4, 3), ProxyMemory(4, 3), *every_memory(features).values()]
    finally:
        torch.set_default_dtype(torch.float32)
    for memory in memories:
        assert {buffer.dtype for buffer in memory.buffers()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("name", ["cluster", "instance", "proxy"])
@pytest.mark.parametrize("way", ["pickle", "copy"])
def test_can_be_saved_whole_and_copied(tmp_path, name, way):
    features, x = features_and_batch()
    memory = every_memory(features)[name]
    if way == "copy":
        other = copy.deepcopy(memory)
    else:  # torch.save pickles
        torch.save(memory, tmp_path / "memory.pt")
        other = torch.load(tmp_path / "memory.pt", weights_only=False)
    other.load_state_dict(memory.state_dict())
    for each in (memory, other):
        each.update_(x, torch.tensor(LABELS))
    torch.testing.assert_close(list(other.buffers()), list(memory.buffers()))


@pytest.mark.parametrize("name", ["cluster", "instance", "proxy"])
@pytest.mark.parametrize("rows", [0, 2, 11])
def test_loads_any_number_of_rows(name, rows):
    features, x = features_and_batch()
    memory = every_memory(features)[name]
    memory.update_(x, LABELS)
    other = torch.nn.ModuleDict({"memory": type(memory)(4, rows)})
    other.load_state_dict({f"memory.{key}": value for key, value in memory.state_dict().items()})
    for each in (memory, other["memory"]):
        each.update_(x, LABELS)
    for key, buffer in memory.named_buffers():
        assert torch.equal(other["memory"].get_buffer(key), buffer), key
    assert torch.equal(other["memory"].loss(x, LABELS), memory.loss(x, LABELS))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cluster", {"features": torch.ones(6, 5)}, r"features must be \(rows, 4\) torch.float32, got \(6, 5\)"),
        ("cluster", {"features": torch.ones(6)}, r"features must be \(rows, 4\) torch.float32, got \(6,\)"),
        ("proxy", {"features": torch.ones(6, 4).double()}, r"features must be .*, got \(6, 4\) torch.float64"),
        ("proxy", {"cameras": torch.ones(6)}, r"cameras must be \(rows\) torch.int64, got \(6,\) torch.float32"),
        ("proxy", {"cameras": torch.ones(2).long()}, "features, clusters, cameras must have as many rows, got 6, 6, 2"),
        ("instance", {"labels": torch.ones(7).long()}, "features, labels must have as many rows, got 6, 7"),
    ],
)
def test_a_state_that_does_not_fit_is_named(name, change, message):
    memory = every_memory(features_and_batch()[0])[name]
    before = {key: buffer.clone() for key, buffer in memory.named_buffers()}
    with pytest.raises(RuntimeError, match=rf"{type(memory).__name__}\.load_state_dict: {message}"):
        memory.load_state_dict(memory.state_dict() | change)
    assert all(torch.equal(memory.get_buffer(key), buffer) for key, buffer in before.items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClusterMemory.from_centroids(torch.ones(3)), ValueError, "centroids must be 2-D"),
        (lambda: ClusterMemory.from_centroids([[1, 2]]), TypeError, "centroids must be floating point"),
        (lambda: InstanceMemory.from_features(torch.ones(2, 2) / 0), ValueError, "features must be finite"),
        (
            lambda: InstanceMemory.from_features(torch.ones(2, 2), source_centroids=torch.ones(2, 3)),
            ValueError,
            "source_centroids must have 2 columns like features, got 3",
        ),
        (lambda: ClusterMemory(2, 3)(torch.ones(1, 2), [0.5]), TypeError, "targets must hold integers"),
        (lambda: InstanceMemory(2, 3)(torch.ones(1, 2), None), TypeError, "rows must be a tensor or an array"),
        (
            lambda: ProxyMemory(2, 3).rows([1, 2], [1]),
            ValueError,
            r"cameras must have one entry for each row of labels",
        ),
    ],
)
def test_names_what_it_cannot_take(make, error, message):
    with pytest.raises(error, match=rf"Memory[.\w]*: {message}"):
        make()

# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the memory update, every rule: on a GPU if there is one, else interpreted.

Truth is the reference in float64; a kernel may be off by twice what the reference in the same dtype is off by.
"""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.kernels import momentum_update as update
from fastreid_u.reference.momentum_update import momentum_update_ as reference_update

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GOLDEN = ["cm_all_b50_d48_k23", "cm_random_b50_d48_k23", "cm_one_b64_d96_k40"]
PUBLISHED = {"cm": "sequential", "hard": "hard"}


def batch(b, c, d, dtype=torch.float32, number=0):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(b, d, generator=generator).to(dtype)
    memory = F.normalize(torch.randn(c, d, generator=generator)).to(dtype)
    return x.to(DEVICE), torch.randint(-1, c, (b,), generator=generator).to(DEVICE), memory.to(DEVICE)


def assert_as_good(found, same_dtype, truth, name):
    """``found`` may err twice as much as ``same_dtype``, and by a few roundings of the largest entry."""
    truth = truth.double()
    roundings = 1 if found.dtype == torch.bfloat16 else 4  # Triton's interpreter cuts bfloat16 off instead of rounding
    slack = roundings * torch.finfo(found.dtype).eps * (truth.abs().max().item() if truth.numel() else 0)
    error, allowed = (found.double() - truth).abs(), 2 * (same_dtype.double() - truth).abs().max() + slack
    worst = error.argmax()
    assert error.max() <= allowed, f"{name}: error {error.max():.3g} > {allowed:.3g} at {worst} of {tuple(truth.shape)}"


def updated(memory, x, targets, **settings):
    memory = memory.clone()
    update.momentum_update_(memory, x, targets, **settings)
    return memory


def settings_of(rule, targets, c):
    """What a rule needs besides: a temperature, or for every other row its last sample."""
    if rule == "weighted":
        return {"rule": rule, "weight_temperature": 0.2}
    if rule == "index":
        index = torch.full((c,), -1, device=DEVICE)
        for b, row in enumerate(targets.tolist()):
            if row >= 0 and row % 2 == 0:
                index[row] = b
        return {"rule": rule, "index": index}
    return {"rule": rule}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rule", update.RULES)
@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 2), (5, 3, 7), (37, 4, 19), (12, 40, 30), (12, 2, 600)])
def test_matches_the_reference(b, c, d, rule, normalize):
    x, targets, memory = batch(b, c, d)
    settings = {"momentum": 0.3, "normalize": normalize, **settings_of(rule, targets, c)}
    x = x if normalize else F.normalize(x) * 1.1
    found = updated(memory, x, targets, **settings)
    same = reference_update(memory.clone(), x, targets, **settings)
    assert_as_good(found, same, reference_update(memory.double(), x.double(), targets, **settings), rule)


@pytest.mark.parametrize(("b", "c", "k", "d"), [(7, 9, 4, 5), (20, 6, 3, 20), (40, 20, 2, 3)])
def test_rows_and_the_means_of_their_clusters(monkeypatch, b, c, k, d):
    monkeypatch.setattr(update, "SAMPLES", 16)  # the next row may be some looks away
    x, targets, memory = batch(b, c, d)
    labels = torch.randint(-1, k, (c,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sizes = torch.bincount(labels[labels >= 0], minlength=k)
    means = torch.randn(k, d, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    clusters = {"rule": "row", "labels": labels, "cluster_sizes": sizes}

    def run(op, dtype):
        rows, moved = memory.to(dtype, copy=True), means.to(dtype, copy=True)
        op(rows, x.to(dtype), targets, cluster_means=moved, **clusters)
        return rows, moved

    found, same = run(update.momentum_update_, x.dtype), run(reference_update, x.dtype)
    assert torch.equal(found[0], updated(memory, x, targets))
    for name, *numbers in zip(("rows", "means"), found, same, run(reference_update, torch.float64), strict=True):
        assert_as_good(*numbers, name)
    untouched = ~torch.isin(torch.arange(k, device=DEVICE), labels[targets[targets >= 0]])
    assert torch.equal(found[1][untouched], means[untouched])


@pytest.mark.parametrize("what", ["label", "target"])
def test_rows_and_means_stay_where_a_number_is_out_of_range(what):
    x, targets, memory = batch(7, 9, 5)
    labels, means = torch.zeros(9, dtype=torch.int64, device=DEVICE), torch.zeros(1, 5, device=DEVICE)
    if what == "label":
        labels[targets.max()] = 1
    else:
        targets[3] = 9
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    clusters = {"labels": labels, "cluster_sizes": torch.tensor([9], device=DEVICE), "cluster_means": means}
    assert torch.equal(updated(memory, x, targets, rule="row", status=status, **clusters), memory)
    assert (means == 0).all()
    assert status.item() == update.BAD_TARGET


def test_means_follow_only_rows_whose_samples_are_finite():
    x, targets, memory = batch(6, 4, 10)
    targets[:] = torch.tensor([0, 1, 0, 2, 2, 3])
    means = torch.zeros(2, 10, device=DEVICE)
    labels, sizes = torch.tensor([0, 0, 1, 1], device=DEVICE), torch.tensor([2, 2], device=DEVICE)
    x[2, 3] = torch.nan
    clusters = {"labels": labels, "cluster_sizes": sizes, "cluster_means": means}
    found = updated(memory, x, targets, rule="row", **clusters)
    assert torch.equal(found, updated(memory, x, targets.where(targets > 0, -1)))
    torch.testing.assert_close(means, ((found - memory)[[0, 2]] + (found - memory)[[1, 3]]) / 2)


def test_means_that_follow_a_half_memory_follow_what_was_stored():
    x, targets, memory = batch(9, 6, 12, torch.bfloat16)
    labels, means = torch.zeros(6, dtype=torch.int64, device=DEVICE), torch.zeros(1, 12, device=DEVICE)
    clusters = {"labels": labels, "cluster_sizes": torch.tensor([6], device=DEVICE), "cluster_means": means}
    found = updated(memory, x, targets, rule="row", **clusters)
    torch.testing.assert_close(means[0], (found.float() - memory.float()).mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("published", ["cm", "hard"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden, name, published):
    file = golden(name)
    x, targets, memory = (file.tensor(key).to(DEVICE) for key in ("inputs", "targets", "features_before"))
    found = updated(memory, x, targets, momentum=0.2, rule=PUBLISHED[published]).cpu()
    torch.testing.assert_close(found, file.tensor(f"features_after_{published}_t0.05_m0.2"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rule": "sequential"}, (0.653552, 0.057648, 0.754683)),
        ({"rule": "sequential", "momentum": 0.2}, (0.710361, 0.107837, 0.695528)),
        ({"rule": "hard"}, (0.664364, 0.0, 0.747409)),
        ({"rule": "mean"}, (0.851258, 0.314849, 0.419798)),
        ({"rule": "weighted", "weight_temperature": 0.5}, (0.827929, 0.251910, 0.501074)),
        ({"rule": "weighted", "weight_temperature": 0.03}, (0.664968, 0.000713, 0.746871)),
        ({"rule": "weighted", "weight_temperature": float("inf")}, (0.851258, 0.314849, 0.419798)),
        ({"rule": "push"}, (0.923939, -0.341360, 0.172656)),
        ({"rule": "push", "push_weight": 0.0}, (0.947794, 0.0, 0.318884)),
    ],
)
def test_by_hand(settings, expected):
    x = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.0, 0.8]], device=DEVICE)
    memory, targets = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.7071]]), torch.tensor([0, 0], device=DEVICE)
    found = updated(F.normalize(memory).to(DEVICE), x, targets, **settings)
    torch.testing.assert_close(found.cpu()[0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tag", ["tau0.03_s0.3", "tau0.07_s0.1", "tau0.6_s0.1"])
def test_golden_dccc(golden, tag):
    file = golden("dccc_memory_b48_d64_k30")
    x, targets, memory = (file.tensor(key).to(DEVICE) for key in ("inputs", "targets", "features_before"))
    temperature = float(tag.removeprefix("tau").partition("_")[0])
    found = updated(memory, x, targets, rule="weighted", weight_temperature=temperature).cpu()
    torch.testing.assert_close(found, file.tensor(f"features_after_wgm_{tag}_m0.1"), atol=1e-6, rtol=0)


def test_golden_instance_rows(golden):
    file = golden("hybrid_unnormalised_n300_b48_d64")
    rows, x, targets, memory = (file.tensor(key) for key in ("rows", "inputs", "indexes", "features_before"))
    arguments = (tensor.to(DEVICE) for tensor in (memory, x, targets))
    found = updated(*arguments, momentum=0.2, rule="row", normalize=False).cpu()
    torch.testing.assert_close(found[rows], file.tensor("features_after_rows_t0.05_m0.2"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", update.RULES)
def test_bits_do_not_depend_on_the_company(rule):
    """Other samples, other rows, gaps in the batch: row 2 sees its own samples in their order, and nothing else."""
    x, _, memory = batch(6, 5, 40)
    targets = torch.full((6,), 2, device=DEVICE)
    alone = updated(memory, x, targets, **settings_of(rule, targets, 5))[2]
    mixed = torch.randn(24, 40, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    targets = torch.tensor([0, 1, 3, -1] * 6, device=DEVICE)
    mixed[1::4], targets[1::4] = x, 2
    rows = torch.cat([memory, -memory[2].expand(5, 40)])  # the new rows are as far as can be
    found = updated(rows, mixed, targets, **settings_of(rule, targets, 10))
    assert torch.equal(found[2], alone)
    assert torch.equal(found[4:], rows[4:])


def test_push_reads_rows_as_they_were():
    """Each other's nearest, both moved: whoever runs first must not be seen by the second."""
    x, targets, memory = batch(2, 2, 9)
    targets[:] = torch.tensor([0, 1])
    found = updated(memory, x, targets, rule="push")
    torch.testing.assert_close(found, reference_update(memory.clone(), x, targets, rule="push"), atol=1e-6, rtol=0)
    assert torch.equal(updated(memory.flip(0), x, 1 - targets, rule="push").flip(0), found)


def test_long_batches(monkeypatch):
    """The walk over the targets goes a block at a time; a sample may be many blocks away from the next of its row."""
    monkeypatch.setattr(update, "SAMPLES", 16)
    x, _, memory = batch(70, 2, 3)
    targets = torch.full((70,), -1, device=DEVICE)
    targets[[3, 15, 16, 69]] = 1
    targets[[0, 50]] = 0
    found = updated(memory, x, targets)
    kept = targets >= 0
    assert torch.equal(found, updated(memory, x[kept], targets[kept]))


def test_hard_takes_the_first_of_a_tie():
    memory, targets = torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE), torch.tensor([0, 0, 0], device=DEVICE)
    found = updated(memory, torch.eye(3, device=DEVICE), targets, momentum=0.0, rule="hard")
    assert found.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_a_half_memory_rounds_once(dtype):
    x, targets, memory = batch(9, 2, 24)
    targets, memory = targets.clamp(min=0), memory.to(dtype)
    truth = reference_update(memory.double(), x.double(), targets)
    error = (updated(memory, x, targets).double() - truth).abs().max()
    assert error <= torch.finfo(dtype).eps * truth.abs().max()


def test_strides_and_dtypes():
    x, targets, memory = batch(7, 4, 10)
    expected = updated(memory, x, targets)
    wide = torch.full((4, 20), 7.0, device=DEVICE)
    wide[:, ::2] = memory
    update.momentum_update_(wide[:, ::2], x.T.contiguous().T, torch.stack([targets, targets], 1)[:, 0].int())
    assert torch.equal(wide[:, ::2], expected)
    assert (wide[:, 1::2] == 7).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="reserves 4 GiB and touches none of it, which only a CPU can")
def test_addresses_past_two_to_the_31(monkeypatch):
    monkeypatch.undo()  # the poison would touch all of it
    rows = torch.empty(2**20 + 1, 2048, dtype=torch.float16)
    rows[-1] = 0
    x = torch.ones(1, 2048)
    update.momentum_update_(rows, x, torch.tensor([2**20]))
    torch.testing.assert_close(rows[-1].float(), F.normalize(x)[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_target_out_of_range_leaves_everything_alone(bad):
    x, targets, memory = batch(7, 4, 10)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    targets[-1] = bad
    assert torch.equal(updated(memory, x, targets, status=status), memory)
    assert status.item() == update.BAD_TARGET


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", [rule for rule in update.RULES if rule != "index"])
def test_not_finite_leaves_its_row_alone(value, rule):
    x, _, memory = batch(6, 4, 10)
    targets = torch.tensor([0, 1, 1, 1, -1, 2], device=DEVICE)
    settings = settings_of(rule, targets, 4)
    expected = updated(memory, x, targets, **settings)
    expected[1] = memory[1]
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    x[2, 3] = x[4, 0] = value
    assert torch.equal(updated(memory, x, targets, **settings, status=status), expected)
    assert status.item() == update.BAD_FEATURE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64], ids=str)
def test_found_inf(dtype):
    x, targets, memory = batch(3, 2, 5)
    one = torch.ones(1, dtype=dtype, device=DEVICE)
    assert torch.equal(updated(memory, x, targets, found_inf=one), memory)
    moved = updated(memory, x, targets, found_inf=torch.zeros_like(one))
    assert torch.equal(moved, updated(memory, x, targets))
    assert not torch.equal(moved, memory)
    assert torch.equal(updated(memory, x, targets, rule="push", found_inf=one), memory)
    means, ids = torch.zeros(1, 5, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    clusters = {"labels": ids, "cluster_sizes": ids[:1] + 2, "cluster_means": means}
    assert torch.equal(updated(memory, x, targets, rule="row", found_inf=one, **clusters), memory)
    assert (means == 0).all()


def test_zero_length_and_nobody_there():
    memory = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=DEVICE)
    x = torch.tensor([[-1.0, 0.0], [0.0, 0.0]], device=DEVICE)
    assert updated(memory, x, torch.tensor([0, 1], device=DEVICE), momentum=0.5).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    nobody = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert torch.equal(updated(memory, x[:0], nobody), memory)
    for rule in ("sequential", "push"):
        assert torch.equal(updated(memory[:0], x, torch.full((2,), -1, device=DEVICE), rule=rule), memory[:0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": torch.ones(3, 5)}, ValueError, "memory, x, targets must be"),
        ({"memory": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "memory must be float32, float16 or bfloat16"),
        ({"rule": "last"}, ValueError, "rule must be one of 'sequential', .*, 'push', got 'last'"),
        ({"rule": "weighted"}, ValueError, "weight_temperature or index must be given"),
        ({"rule": "index"}, ValueError, "weight_temperature or index must be given"),
    ],
)
def test_rejects(change, error, message):
    arguments = {"memory": torch.ones(3, 4), "x": torch.ones(2, 4), "targets": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=f"momentum_update_: {message}"):
        update.momentum_update_(**arguments)
    assert (arguments["memory"] == 1).all()


@pytest.mark.parametrize("rule", update.RULES)
def test_one_launch_and_nothing_read_back(launches, torch_calls, rule):
    """Meta tensors refuse every read by the host; "push" looks for the other rows in a launch of its own."""
    made = launches(update)
    x, memory = torch.zeros(256, 2048, device="meta"), torch.zeros(700, 2048, device="meta")
    targets, ids = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (256, 700))
    settings = {"weight_temperature": 0.1, "index": ids, "found_inf": torch.zeros(1, device="meta")}
    if rule == "row":
        settings |= {"labels": ids, "cluster_sizes": ids, "cluster_means": torch.zeros(700, 2048, device="meta")}
    with torch_calls() as calls:
        update.momentum_update_(memory, x, targets, rule=rule, **settings)
    kernel = "_row_update_kernel" if rule == "row" else "_momentum_update_kernel"
    assert [name for name, _ in made] == (["_nearest_other_kernel", kernel] if rule == "push" else [kernel])
    assert calls.computed == []  # each would be one more launch
    assert calls.bytes == (4 * 256 * 2048 + 8 * 256 * 22 if rule == "push" else 0)

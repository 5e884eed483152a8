# SPDX-License-Identifier: Apache-2.0
"""Every option of the Triton ``cluster_nce``: on a GPU if there is one, else interpreted.

Truth is the reference in float64; the kernel may be off by twice what the reference in the same dtype is off by.
"""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.kernels import cluster_nce as nce
from fastreid_u.reference.cluster_nce import cluster_nce as reference

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = [
    "teacher", "teacher, each", "smoothing", "smoothing, each", "extra", "extra, each", "focal", "epsilon",
    "epsilon and focal", "mask", "all",
]  # fmt: skip


def batch(name, b, c, d, dtype=torch.float32):
    """x, targets, memory, and the settings of an option. Every third class is masked, rows have several lengths."""
    generator = torch.Generator().manual_seed(b + c + d)
    x, teacher = (torch.randn(b, d, generator=generator).to(DEVICE, dtype) for _ in range(2))
    memory = F.normalize(torch.randn(c, d, generator=generator)) * (0.5 + torch.rand(c, 1, generator=generator))
    mask = torch.arange(c) % 3 != 1
    targets = torch.randint(c, (b,), generator=generator) // 3 * 3
    targets[4::5] = -1
    extra = torch.rand(b, c, generator=generator).to(DEVICE) / c
    share = torch.linspace(0, 0.5, b).to(DEVICE)
    mask = mask.to(DEVICE)
    settings = {
        "teacher": {"teacher": teacher, "teacher_weight": 0.3, "teacher_temperature": 0.07},
        "teacher, each": {"teacher": teacher, "teacher_weight": share, "class_mask": mask},
        "smoothing": {"smoothing": 0.2},
        "smoothing, each": {"smoothing": share, "class_mask": mask},
        "extra": {"extra_target": extra, "extra_weight": 0.4},
        "extra, each": {"extra_target": extra, "extra_weight": share, "class_mask": mask},
        "focal": {"focal": 2},
        "epsilon": {"epsilon": 1e-2},
        "epsilon and focal": {"epsilon": 1e-6, "focal": 4, "class_mask": mask},
        "mask": {"class_mask": mask},
        "all": {
            "teacher": teacher, "teacher_weight": 0.2, "smoothing": share, "extra_target": extra, "extra_weight": 0.1,
            "focal": 1.5, "class_mask": mask, "weight": torch.linspace(0.5, 2, b).to(DEVICE),
        },
    }[name]  # fmt: skip
    return x, targets.to(DEVICE), memory.to(DEVICE, dtype), settings


def in_double(settings):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in settings.items()}


def loss_and_gradients(op, x, targets, memory, **settings):
    x, memory = x.detach().clone().requires_grad_(), memory.detach().clone().requires_grad_()
    loss = op(x, targets, memory, **settings)
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device)
    (loss * upstream.reshape(loss.shape)).sum().backward()
    return loss.detach(), x.grad, memory.grad


def check(x, targets, memory, *, lean=None, **settings):
    found = loss_and_gradients(nce.cluster_nce, x, targets, memory, lean=lean, **settings)
    same = loss_and_gradients(reference, x, targets, memory, **settings)
    truth = loss_and_gradients(reference, x.double(), targets, memory.double(), **in_double(settings))
    for name, f, s, t in zip(("loss", "gradient to x", "gradient to memory"), found, same, truth, strict=True):
        assert f.dtype == s.dtype
        roundings = 1 if f.dtype == torch.bfloat16 else 4  # the interpreter cuts bfloat16 off instead of rounding
        slack = roundings * torch.finfo(f.dtype).eps * t.abs().max().item()
        error, allowed = (f.double() - t).abs().max().item(), 2 * (s.double() - t).abs().max().item() + slack
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("b", "c", "d", "temperature"), [(1, 4, 2, 0.2), (5, 67, 6, 0.2), (66, 7, 33, 0.2), (48, 200, 128, 0.05)]
)
def test_matches_the_reference(name, b, c, d, temperature):
    x, targets, memory, settings = batch(name, b, c, d)
    check(x, targets, memory, temperature=temperature, **settings)


@pytest.mark.parametrize("name", OPTIONS)
def test_one_class_of_one_column(name):
    x, targets, memory, settings = batch(name, 1, 1, 1)
    found = loss_and_gradients(nce.cluster_nce, x, targets, memory, temperature=1, **settings)
    expected = loss_and_gradients(reference, x, targets, memory, temperature=1, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["all", "epsilon and focal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype):
    x, targets, memory, settings = batch(name, 9, 70, 33, dtype)
    check(x, targets, memory, **settings)


@pytest.mark.parametrize("name", ["all", "epsilon and focal"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lean", [False, True])
def test_settings(name, reduction, lean):
    x, targets, memory, settings = batch(name, 9, 70, 12)
    check(0.5 * x, targets, memory, normalize=False, reduction=reduction, temperature=0.4, lean=lean, **settings)


@pytest.mark.parametrize("name", ["all", "epsilon and focal"])
def test_classes_split_over_programs(name, monkeypatch):
    x, targets, memory, settings = batch(name, 6, 300, 9)
    settings |= {"temperature": 0.2}  # few samples, all of them very wrong, would compare single roundings
    check(x, targets, memory, **settings)
    monkeypatch.setattr(nce.backward, "LEAN_BYTES", 4 * 12 * 64)
    monkeypatch.setattr(nce.loss, "MAX_SPLITS", 2)
    check(x, targets, memory, **settings)


@pytest.mark.parametrize("name", ["all", "epsilon and focal"])
def test_lean_in_blocks(name, monkeypatch, exact_sums):
    x, targets, memory, settings = batch(name, 6, 300, 9)
    x, memory, teacher = exact_sums(x, memory, settings.get("teacher", x))
    settings |= {"temperature": 0.2} | ({"teacher": teacher} if "teacher" in settings else {})
    stored = loss_and_gradients(nce.cluster_nce, x, targets, memory, lean=False, **settings)
    monkeypatch.setattr(nce.backward, "LEAN_BYTES", 4 * 12 * 64)
    lean = loss_and_gradients(nce.cluster_nce, x, targets, memory, lean=True, **settings)
    assert torch.equal(lean[0], stored[0])
    torch.testing.assert_close(lean[1:], stored[1:], rtol=1e-5, atol=1e-6)


def test_a_whole_split_may_be_masked():
    """As of a classifier that was allocated larger than the clusters of this epoch."""
    x, targets, memory, settings = batch("all", 5, 200, 6)
    mask = torch.arange(200, device=DEVICE) >= 130
    targets = torch.arange(5, device=DEVICE) + 130
    settings = settings | {"class_mask": mask}
    check(x, targets, memory, **settings)
    _, _, gradient = loss_and_gradients(nce.cluster_nce, x, targets, memory, **settings)
    assert (gradient[~mask] == 0).all()


def test_mixed_dtypes_and_strides():
    x, targets, memory, settings = batch("all", 9, 13, 20)
    expected = nce.cluster_nce(x, targets, memory, **settings)
    for name in ("teacher", "extra_target"):
        moved = settings | {name: settings[name].T.contiguous().T}
        assert torch.equal(nce.cluster_nce(x, targets, memory, **moved), expected)
        check(x, targets, memory, **settings | {name: settings[name].half()})
    each = torch.stack([settings["smoothing"]] * 2, 1)[:, 0]
    assert torch.equal(nce.cluster_nce(x, targets, memory, **settings | {"smoothing": each}), expected)


def test_bits_of_a_sample_do_not_depend_on_its_company(exact_sums):
    x, targets, memory, settings = batch("all", 70, 40, 9)
    x, memory, settings["teacher"] = exact_sums(x, memory, settings["teacher"])
    each = nce.cluster_nce(x, targets, memory, reduction="none", **settings)
    rows = slice(3, 8)
    own = {k: v[rows] if torch.is_tensor(v) and k not in ("class_mask",) else v for k, v in settings.items()}
    assert torch.equal(nce.cluster_nce(x[rows], targets[rows], memory, reduction="none", **own), each[rows])


def test_ignored_samples_may_hold_anything():
    x, targets, memory, settings = batch("all", 9, 13, 6)
    targets[4] = -1
    fine = loss_and_gradients(nce.cluster_nce, x, targets, memory, **settings)
    for given in (x, settings["teacher"], settings["extra_target"], settings["smoothing"], settings["weight"]):
        given[4] = torch.nan
    found = loss_and_gradients(nce.cluster_nce, x, targets, memory, **settings)
    torch.testing.assert_close(found, fine)
    assert (found[1][4] == 0).all()


@pytest.mark.parametrize(("bad", "bit"), [(13, nce.BAD_TARGET), (-2, nce.BAD_TARGET), (1, nce.MASKED_TARGET)])
def test_bad_target_is_nan_and_flagged(bad, bit):
    x, targets, memory, settings = batch("all", 9, 13, 6)
    targets[:] = 0
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    fine = nce.cluster_nce(x, targets, memory, reduction="none", status=status, **settings)
    assert status.item() == 0
    targets[4] = bad
    each = nce.cluster_nce(x, targets, memory, reduction="none", status=status, **settings)
    assert status.item() == bit
    assert each.isnan().tolist() == [b == 4 for b in range(9)]
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(each[others], fine[others])


def test_every_class_masked():
    x, targets, memory, settings = batch("all", 4, 5, 6)
    settings["class_mask"] = torch.zeros(5, dtype=torch.bool, device=DEVICE)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    targets[:] = -1
    loss, gradient, to_memory = loss_and_gradients(nce.cluster_nce, x, targets, memory, status=status, **settings)
    assert loss == 0
    assert (gradient == 0).all()
    assert (to_memory == 0).all()
    assert status.item() == 0
    targets[1] = 2
    assert nce.cluster_nce(x, targets, memory, status=status, **settings).isnan()
    assert status.item() == nce.MASKED_TARGET


def test_surely_right_and_surely_wrong():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=DEVICE)
    memory = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=DEVICE)
    targets = torch.tensor([0, 1], device=DEVICE)
    for settings in ({"focal": 1}, {"focal": 2.5}, {"epsilon": 1e-6}, {"epsilon": 1e-6, "focal": 4}):
        check(x, targets, memory, temperature=0.005, **settings)


@pytest.mark.parametrize("name", ["hybrid_plain_n300_b48_d64", "hybrid_unused_labels_n300_b48_d64"])
def test_golden_spcl(golden, name):
    file = golden(name)
    labels = file.tensor("labels")
    count = torch.bincount(labels)
    memory = torch.zeros(len(count), 64).index_add_(0, labels, file.tensor("features_before"))
    memory = (memory / count.clamp(min=1)[:, None]).to(DEVICE)
    x, targets = file.tensor("inputs").to(DEVICE).requires_grad_(), labels[file.tensor("indexes")].to(DEVICE)
    settings = {"normalize": False, "class_mask": (count > 0).to(DEVICE), "epsilon": 1e-6}
    loss = nce.cluster_nce(x, targets, memory, **settings)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss.detach().cpu(), file.tensor("loss_t0.05_m0.2"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu(), file.tensor("grad_t0.05_m0.2"), rtol=1e-4, atol=2e-6)


def test_golden_cacl(golden):
    file = golden("cacl_memory_n240_b40_d64")
    labels = file.tensor("labels")
    count = torch.bincount(labels)
    memory = torch.zeros(len(count), 64).index_add_(0, labels, file.tensor("features_before"))
    memory = (memory / count.clamp(min=1)[:, None]).to(DEVICE)
    x, targets = file.tensor("inputs").to(DEVICE).requires_grad_(), labels[file.tensor("indexes")].to(DEVICE)
    settings = {"normalize": False, "class_mask": (count > 0).to(DEVICE), "epsilon": 1e-6, "focal": 4}
    loss = nce.cluster_nce(x, targets, memory, **settings)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss.detach().cpu(), file.tensor("loss_back0_t0.05_m0.2"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu(), file.tensor("grad_inputs_back0_t0.05_m0.2"), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("tag", ["wgm_tau0.03_s0.3_m0.1", "wgm_tau0.07_s0.1_m0.1"])
def test_golden_dccc(golden, tag):
    file = golden("dccc_memory_b48_d64_k30")
    x, teacher, targets, memory = (
        file.tensor(name).to(DEVICE) for name in ("inputs", "inputs_ema", "targets", "features_before")
    )
    x.requires_grad_()
    loss = nce.cluster_nce(x, targets, memory, teacher=teacher, teacher_weight=float(tag.split("_s")[1].split("_")[0]))
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss.detach().cpu(), file.tensor(f"loss_s_{tag}"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu(), file.tensor(f"grad_1.0_{tag}"), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.ones(2, 5)}, r"teacher must have shape \(2, 4\), got \(2, 5\)"),
        ({"extra_target": torch.ones(3, 2)}, r"extra_target must have shape \(2, 3\), got \(3, 2\)"),
        ({"class_mask": torch.ones(2)}, r"class_mask must have shape \(3,\), got \(2,\)"),
        ({"smoothing": torch.ones(3)}, r"smoothing must have shape \(2,\), got \(3,\)"),
        ({"focal": 0.5}, "focal must be 0 or at least 1, got 0.5"),
        ({"focal": -2}, "focal must be 0 or at least 1, got -2"),
        ({"epsilon": 0.1, "smoothing": 0.1}, "epsilon must be 0 with a teacher, smoothing or extra_target, got 0.1"),
    ],
)
def test_rejects(change, message):
    arguments = {"x": torch.ones(2, 4), "targets": torch.tensor([0, 1]), "memory": torch.ones(3, 4), **change}
    with pytest.raises(ValueError, match=f"cluster_nce: {message}"):
        nce.cluster_nce(**arguments)

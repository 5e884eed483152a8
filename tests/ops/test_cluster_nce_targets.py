# SPDX-License-Identifier: Apache-2.0
"""The targets, masks and factors of ``cluster_nce``: published numbers, formulas, gradients, bad input."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.cluster_nce import cluster_nce

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.5, 1.0, 0.5, 0.0]], dtype=torch.float64)
RAW = {"temperature": 1.0, "normalize": False}


def on_logits(logits, targets, **settings):
    """The loss of given logits, and its gradient to them: the memory is the unit matrix."""
    logits = logits.clone().requires_grad_()
    loss = cluster_nce(logits, targets, torch.eye(logits.shape[1], dtype=logits.dtype), **RAW | settings)
    return loss.detach(), *torch.autograd.grad(loss, logits)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, 0.440190),
        ({"teacher": TEACHER, "teacher_weight": 0.1}, 0.531732),
        ({"teacher": TEACHER, "teacher_weight": 0.3}, 0.714817),
        ({"focal": 2}, 0.0558146),
        ({"focal": 4}, 0.00707712),
        ({"smoothing": 0.1}, 0.590190),
        ({"smoothing": torch.tensor([0.75])}, 0.525469 + 0.75 * torch.tensor(4.0).log().item()),
    ],
)
def test_numbers_by_hand(settings, loss):
    found, _ = on_logits(LOGITS, torch.tensor([0]), **settings)
    assert found.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "gradient"),
    [
        ({"teacher": TEACHER, "teacher_weight": 0.1}, (-0.301591, 0.209282, 0.070404, 0.021905)),
        ({"teacher": TEACHER, "teacher_weight": 0.3}, (-0.192602, 0.154082, 0.036923, 0.001598)),
        ({"focal": 2}, 0.328658),
        ({"focal": 4}, 0.0672683),
    ],
)
def test_gradients_by_hand(settings, gradient):
    _, found = on_logits(LOGITS, torch.tensor([0]), **settings)
    if isinstance(gradient, float):  # a factor on that of the cross-entropy
        gradient = (gradient * (LOGITS.softmax(1) - F.one_hot(torch.tensor(0), 4)))[0].tolist()
    torch.testing.assert_close(found[0], torch.tensor(gradient, dtype=torch.float64), atol=1e-6, rtol=0)


def test_ensemble_of_parts_by_hand():
    parts = torch.tensor([[1.5, 1, 0.5, 0], [0, 2, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    shares = torch.tensor([0.2, 0.6, 0.4], dtype=torch.float64).softmax(0)
    ensemble = (shares[:, None] * parts.softmax(1)).sum(0, keepdim=True)
    found, _ = on_logits(LOGITS, torch.tensor([0]), extra_target=ensemble, extra_weight=0.5)
    assert found.item() == pytest.approx(1.049706, abs=1e-6)


def close(found, expected, *, grad=False):
    tolerance = {"rtol": 1e-4, "atol": 2e-6} if grad else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)


def means(features, labels):
    """Means of the rows of each label, not normalised, and which labels have any row."""
    count = torch.bincount(labels)
    total = torch.zeros(len(count), features.shape[1]).index_add_(0, labels, features)
    return total / count.clamp(min=1)[:, None], count > 0


@pytest.mark.parametrize("name", ["hybrid_plain_n300_b48_d64", "hybrid_unused_labels_n300_b48_d64"])
@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_golden_spcl(golden, name, temperature):
    file = golden(name)
    memory, mask = means(file.tensor("features_before"), file.tensor("labels"))
    x = file.tensor("inputs").requires_grad_()
    targets = file.tensor("labels")[file.tensor("indexes")]
    settings = {"temperature": temperature, "normalize": False, "class_mask": mask, "epsilon": 1e-6}
    loss = cluster_nce(x, targets, memory, **settings)
    close(loss.detach(), file.tensor(f"loss_t{temperature}_m0.2"))
    close(*torch.autograd.grad(loss, x), file.tensor(f"grad_t{temperature}_m0.2"), grad=True)
    plain = cluster_nce(x.detach(), targets, memory, **settings | {"epsilon": 0})
    assert plain.item() == pytest.approx(
        file.meta["params"]["exact_logsoftmax_loss_not_official"][f"t{temperature}"], rel=1e-5
    )


@pytest.mark.parametrize(("temperature", "momentum"), [(0.05, 0.2), (0.1, 0.1)])
def test_golden_cacl(golden, temperature, momentum):
    file = golden("cacl_memory_n240_b40_d64")
    memory, mask = means(file.tensor("features_before"), file.tensor("labels"))
    x = file.tensor("inputs").requires_grad_()
    targets = file.tensor("labels")[file.tensor("indexes")]
    settings = {"temperature": temperature, "normalize": False, "class_mask": mask, "epsilon": 1e-6, "focal": 4}
    loss = cluster_nce(x, targets, memory, **settings)
    tag = f"back0_t{temperature}_m{momentum}"
    close(loss.detach(), file.tensor(f"loss_{tag}"))
    close(*torch.autograd.grad(loss, x), file.tensor(f"grad_inputs_{tag}"), grad=True)


@pytest.mark.parametrize("tag", ["wgm_tau0.03_s0.3_m0.1", "wgm_tau0.07_s0.1_m0.1"])
def test_golden_dccc(golden, tag):
    file = golden("dccc_memory_b48_d64_k30")
    x = file.tensor("inputs").requires_grad_()
    smooth = float(tag.split("_s")[1].split("_")[0])
    for share in (0.3, 1.0):  # lambda: DCCC's two losses are one with kappa = lambda * smooth
        settings = {"teacher": file.tensor("inputs_ema"), "teacher_weight": share * smooth}
        loss = cluster_nce(x, file.tensor("targets"), file.tensor("features_before"), **settings)
        expected = (1 - share) * file.tensor(f"loss_c_{tag}") + share * file.tensor(f"loss_s_{tag}")
        close(loss.detach(), expected)
        close(*torch.autograd.grad(loss, x), file.tensor(f"grad_{share}_{tag}"), grad=True)


@pytest.mark.parametrize(
    ("name", "share"), [("softentropy", 1.0), ("softentropysmooth0.1", 0.1), ("softentropysmooth0.3", 0.3)]
)
def test_golden_soft_entropy(golden, name, share):
    file = golden("dccc_functions_b48_d64_k30")
    settings = {"teacher": file.tensor("logits_b"), "teacher_weight": share}
    loss, gradient = on_logits(file.tensor("logits_a"), file.tensor("targets"), **settings)
    close(loss, file.tensor(f"loss_{name}"))
    close(gradient, file.tensor(f"grad_{name}"), grad=True)


def test_golden_uniform_smoothing(golden):
    file = golden("dccc_functions_b48_d64_k30")
    loss, gradient = on_logits(file.tensor("logits_a"), file.tensor("targets"), smoothing=0.1)
    close(loss, file.tensor("loss_labelsmooth0.1"))
    close(gradient, file.tensor("grad_labelsmooth0.1"), grad=True)


@pytest.fixture
def batch():
    """x, targets, memory; and every option's tensor, in float64."""
    generator = torch.Generator().manual_seed(3)

    def make(b=6, c=5, d=4):
        x, teacher = (torch.randn(b, d, generator=generator, dtype=torch.float64) for _ in range(2))
        memory = 0.8 * F.normalize(torch.randn(c, d, generator=generator, dtype=torch.float64))
        targets = torch.arange(b) % (c - 1)
        targets[-1] = -1
        mask = torch.arange(c) < c - 1
        extra = torch.rand(b, c, generator=generator, dtype=torch.float64)
        share = torch.linspace(0, 0.5, b, dtype=torch.float64)
        return x, targets, memory, teacher, mask, extra, share

    return make


OPTIONS = [
    "teacher", "teacher, each", "smoothing", "smoothing, each", "extra", "extra, each", "focal", "epsilon",
    "epsilon and focal", "mask", "all",
]  # fmt: skip


def option(name, teacher, mask, extra, share):
    return {
        "teacher": {"teacher": teacher, "teacher_weight": 0.3, "teacher_temperature": 0.7},
        "teacher, each": {"teacher": teacher, "teacher_weight": share},
        "smoothing": {"smoothing": 0.2},
        "smoothing, each": {"smoothing": share},
        "extra": {"extra_target": extra, "extra_weight": 0.4},
        "extra, each": {"extra_target": extra, "extra_weight": share},
        "focal": {"focal": 2},
        "epsilon": {"epsilon": 1e-2},
        "epsilon and focal": {"epsilon": 1e-2, "focal": 4, "class_mask": mask},
        "mask": {"class_mask": mask},
        "all": {
            "teacher": teacher, "teacher_weight": 0.2, "smoothing": share, "extra_target": extra, "extra_weight": 0.1,
            "focal": 1.5, "class_mask": mask,
        },
    }[name]  # fmt: skip


def by_the_formula(x, targets, memory, settings):
    """The docstring, sample by sample."""
    mask = settings.get("class_mask", torch.ones(len(memory), dtype=torch.bool))
    epsilon, losses = settings.get("epsilon", 0), []
    for i, y in enumerate(targets.tolist()):
        if y == -1:
            losses.append(x.new_zeros(()))
            continue

        def exponentials(row, temperature):
            return torch.exp(memory @ row / row.norm() / temperature) * mask

        def each(name, i=i):
            share = settings.get(name, 0)
            return share[i] if isinstance(share, torch.Tensor) else share

        e = exponentials(x[i], 0.3)
        p = e / (e.sum() + epsilon)
        t = torch.zeros_like(p)
        t[y] = 1 - each("teacher_weight") - each("smoothing") - each("extra_weight")
        if "teacher" in settings:
            q = exponentials(settings["teacher"][i], settings.get("teacher_temperature", 0.3))
            t += each("teacher_weight") * q / q.sum()
        t += each("smoothing") * mask.double() / mask.sum()
        if "extra_target" in settings:
            t += each("extra_weight") * settings["extra_target"][i] * mask
        losses.append((1 - p[y]) ** settings.get("focal", 0) * -(t * torch.log(p + epsilon).where(mask, 0)).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_formula(batch, name):
    x, targets, memory, *tensors = batch()
    settings = option(name, *tensors)
    found = cluster_nce(x, targets, memory, temperature=0.3, reduction="none", **settings)
    torch.testing.assert_close(found, by_the_formula(x, targets, memory, settings), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(batch, name, normalize):
    x, targets, memory, *tensors = batch(4, 4, 3)
    settings = option(name, *tensors) | {"weight": torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)}
    memory.requires_grad_("teacher" not in settings)  # its distribution depends on the memory, and is held constant

    def loss(x, memory):
        return cluster_nce(x, targets, memory, temperature=0.3, normalize=normalize, **settings)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), memory))


@pytest.mark.parametrize("each", [True, False])
def test_a_teacher_is_an_extra_target(batch, each):
    """Its distribution computed beforehand gives the same loss and gradients, that of the memory among them."""
    x, targets, memory, teacher, mask, _, share = batch()
    share = share if each else 0.3
    q = (F.normalize(teacher) @ memory.T / 0.7).masked_fill(~mask, -torch.inf).softmax(1)
    both = []
    for soft in (
        {"teacher": teacher, "teacher_weight": share, "teacher_temperature": 0.7},
        {"extra_target": q, "extra_weight": share},
    ):
        leaves = x.clone().requires_grad_(), memory.clone().requires_grad_()
        loss = cluster_nce(leaves[0], targets, leaves[1], temperature=0.3, class_mask=mask, **soft)
        both.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*both)


def test_no_gradient_to_the_target(batch):
    x, targets, memory, teacher, _, extra, share = batch()
    learning = [tensor.requires_grad_() for tensor in (teacher, extra, share)]
    settings = {"teacher": teacher, "teacher_weight": 0.1, "extra_target": extra, "extra_weight": 0.1}
    cluster_nce(x.requires_grad_(), targets, memory, smoothing=share, **settings).backward()
    assert x.grad.abs().sum() > 0
    assert [tensor.grad for tensor in learning] == [None] * 3


@pytest.mark.parametrize("name", OPTIONS)
def test_ignored_samples_may_hold_anything_and_get_no_gradient(batch, name):
    x, targets, memory, *tensors = batch()
    settings = option(name, *tensors)
    kept = targets != -1
    leaf = memory.clone().requires_grad_()
    of_kept = {k: v[kept] if k in PER_SAMPLE and isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    expected = cluster_nce(x[kept], targets[kept], leaf, **of_kept)
    (memory_gradient,) = torch.autograd.grad(expected, leaf)
    for given in (x, settings.get("teacher"), settings.get("extra_target")):
        if given is not None:
            given[~kept] = torch.nan
    found = cluster_nce(x.requires_grad_(), targets, leaf, **settings)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, (x, leaf))
    assert (gradients[0][~kept] == 0).all()
    torch.testing.assert_close(gradients[1], memory_gradient)


PER_SAMPLE = ("teacher", "extra_target", "teacher_weight", "smoothing", "extra_weight")


def test_masked_classes_get_no_probability_and_no_gradient(batch):
    x, targets, memory, teacher, mask, extra, _ = batch()
    shares = {"teacher_weight": 0.2, "smoothing": 0.3, "extra_weight": 0.1}
    settings = {"teacher": teacher, "extra_target": extra, **shares}
    without = settings | {"extra_target": extra[:, mask]}
    leaf = memory.clone().requires_grad_()
    found = cluster_nce(x, targets, leaf, class_mask=mask, **settings)
    torch.testing.assert_close(found, cluster_nce(x, targets, memory[mask], **without))
    (gradient,) = torch.autograd.grad(found, leaf)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any(dim=1).all()


def test_the_teacher_of_a_student_that_agrees_leaves_its_entropy(batch):
    """With the whole target from the student itself, the loss is its entropy, and its gradient is zero."""
    x, targets, memory, *_ = batch()
    x.requires_grad_()
    loss = cluster_nce(x, targets, memory, teacher=x.detach(), teacher_weight=1.0)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.abs().max() < 1e-12
    p = (F.normalize(x) @ memory.T / 0.05).softmax(1)[targets != -1]
    torch.testing.assert_close(loss, -(p * p.log()).sum(1).mean())


def test_epsilon_bounds_the_loss_and_survives_low_temperatures():
    x, memory = torch.tensor([[1.0, 0.0]]).requires_grad_(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for temperature in (0.05, 0.005):
        loss = cluster_nce(x, torch.tensor([1]), memory, temperature=temperature, epsilon=1e-6)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.item() == pytest.approx(13.8155, abs=1e-3)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("focal", [1, 2, 4.5])
def test_a_sample_that_is_surely_right_has_no_focal_loss(focal):
    x = torch.tensor([[1.0, 0.0]]).requires_grad_()
    memory = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = cluster_nce(x, torch.tensor([0]), memory, temperature=0.001, focal=focal)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_nan_shows_in_the_loss(batch):
    x, targets, memory, teacher, *_ = batch()
    teacher[2] = torch.nan
    each = cluster_nce(x, targets, memory, teacher=teacher, teacher_weight=0.1, reduction="none")
    assert each.isnan().tolist() == [i == 2 for i in range(6)]


@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_without_a_graph_break(batch, name):
    x, targets, memory, *tensors = batch()
    settings = option(name, *tensors)
    torch._dynamo.reset()
    compiled = torch.compile(cluster_nce, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, targets, memory, **settings), cluster_nce(x, targets, memory, **settings))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": torch.ones(3, 4)}, ValueError, "teacher_weight must be given with teacher, got None"),
        ({"teacher_weight": 0.1}, ValueError, "teacher must be given with teacher_weight, got None"),
        ({"teacher_temperature": 0.1}, ValueError, "teacher must be given with teacher_temperature, got None"),
        ({"teacher": torch.ones(2, 4), "teacher_weight": 0.1}, ValueError, "teacher must have one entry for each row"),
        ({"teacher": torch.ones(3, 5), "teacher_weight": 0.1}, ValueError, "teacher must have 4 columns like x, got 5"),
        ({"teacher": torch.ones(3, 4).long(), "teacher_weight": 0.1}, TypeError, "teacher must be floating point"),
        ({"teacher": torch.ones(3, 4), "teacher_weight": 1.5}, ValueError, r"teacher_weight must lie in \[0, 1\], got"),
        ({"teacher": torch.ones(3, 4), "teacher_weight": "a"}, TypeError, "teacher_weight must be"),
        ({"teacher": torch.ones(3, 4, device="meta"), "teacher_weight": 0.1}, ValueError, "teacher must be on cpu"),
        ({"smoothing": -0.1}, ValueError, r"smoothing must lie in \[0, 1\], got -0.1"),
        ({"smoothing": torch.tensor([0.1, 0.2])}, ValueError, r"smoothing must have one entry for each row of x \(3\)"),
        ({"smoothing": torch.tensor([0.1, 2.0, 0])}, ValueError, r"smoothing must lie in \[0, 1\], got 2"),
        ({"smoothing": torch.tensor([0.1, torch.nan, 0])}, ValueError, r"smoothing must lie in \[0, 1\], got nan"),
        ({"extra_target": torch.ones(3, 5)}, ValueError, "extra_weight must be given with extra_target, got None"),
        ({"extra_weight": 0.5}, ValueError, "extra_target must be given with extra_weight, got None"),
        ({"extra_target": torch.ones(3, 4), "extra_weight": 0.5}, ValueError, "extra_target must have a column for"),
        ({"extra_target": torch.ones(2, 5), "extra_weight": 0.5}, ValueError, "extra_target must have one entry"),
        (
            {"extra_target": torch.ones(3, 5), "extra_weight": 0.5, "smoothing": 0.6},
            ValueError, r"the sum of teacher_weight, smoothing and extra_weight must lie in \[0, 1\], got 1.1",
        ),
        (
            {"extra_target": torch.ones(3, 5), "extra_weight": torch.full((3,), 0.5), "smoothing": 0.6},
            ValueError, r"the sum of teacher_weight, smoothing and extra_weight must lie in \[0, 1\], got 1.1",
        ),
        ({"focal": -1}, ValueError, r"focal must lie in \[0, inf\), got -1"),
        ({"focal": 0.5}, ValueError, "focal must be 0 or at least 1, got 0.5"),
        ({"focal": torch.nan}, ValueError, "focal must lie in"),
        ({"epsilon": 1}, ValueError, r"epsilon must lie in \[0, 1\), got 1"),
        ({"epsilon": 1e-6, "smoothing": 0.1}, ValueError, "epsilon must be 0 with a teacher, smoothing or extra"),
        (
            {"epsilon": 1e-6, "teacher": torch.ones(3, 4), "teacher_weight": 0.1},
            ValueError, "epsilon must be 0 with a teacher, smoothing or extra_target, got 1e-06",
        ),
        ({"class_mask": torch.ones(5)}, TypeError, "class_mask must be bool, got torch.float32"),
        ({"class_mask": torch.ones(4, dtype=torch.bool)}, ValueError, "class_mask must have one entry for each row"),
        ({"class_mask": torch.arange(5) != 1}, ValueError, "targets must be True in class_mask, got 1"),
        ({"class_mask": torch.zeros(5, dtype=torch.bool)}, ValueError, "targets must be True in class_mask, got 0"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight must be on cpu like x, got meta"),
        ({"memory": torch.ones(5, 4, device="meta")}, ValueError, "memory must be on cpu like x, got meta"),
    ],
)  # fmt: skip
def test_rejects(change, error, message):
    arguments = {"x": torch.ones(3, 4), "targets": torch.tensor([0, 1, 2]), "memory": torch.ones(5, 4), **change}
    with pytest.raises(error, match=f"cluster_nce: {message}"):
        cluster_nce(**arguments)


def test_empty_batch_with_everything(batch):
    x, _, memory, *_ = batch()
    settings = {"teacher": x[:0], "teacher_weight": 0.1, "smoothing": torch.zeros(0), "focal": 2}
    nobody = torch.zeros(0, dtype=torch.int64)
    mask = torch.zeros(5, dtype=torch.bool)
    assert cluster_nce(x[:0], nobody, memory, class_mask=mask, **settings).item() == 0

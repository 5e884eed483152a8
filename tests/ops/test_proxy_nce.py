# SPDX-License-Identifier: Apache-2.0
"""The loss over camera-aware proxies: value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.ops.momentum_update import momentum_update_
from fastreid_u.ops.proxy_nce import proxy_nce


@pytest.fixture
def batch():
    """``batch(b)``: samples of 5 clusters and 3 cameras, and a proxy for each pair but those that nobody asks for."""

    def make(b=9, d=6, clusters=5, cameras=3, dtype=torch.float64):
        generator = torch.Generator().manual_seed(b + d)
        y = torch.randint(clusters, (b,), generator=generator)
        a = torch.randint(cameras, (b,), generator=generator)
        pairs = torch.cartesian_prod(torch.arange(cameras), torch.arange(clusters))
        memory = F.normalize(torch.randn(len(pairs), d, generator=generator, dtype=torch.float64))
        x = torch.randn(b, d, generator=generator, dtype=torch.float64)
        return x.to(dtype), y, a, memory.to(dtype), pairs[:, 1].contiguous(), pairs[:, 0].contiguous()

    return make


def proxies(file, labels, cameras):
    """Memory, clusters and cameras of the proxies of a golden file: camera by camera, in each clusters ascending."""
    ids = sorted(set(cameras.tolist()))
    seen = [labels[(cameras == camera) & (labels >= 0)].unique() for camera in ids]
    memory = torch.cat([file.tensor(f"prototypes_cam{camera}") for camera in ids])
    owner = torch.repeat_interleave(torch.tensor(ids), torch.tensor([len(clusters) for clusters in seen]))
    return memory, torch.cat(seen), owner


@pytest.mark.parametrize("name", ["cap_losses_many_proxies", "cap_losses_few_proxies"])
@pytest.mark.parametrize("inter", [False, True])
def test_golden_cap(golden, name, inter):
    """Loss, gradient and proxies over a few steps; with few proxies published code counts positives twice."""
    file = golden(name)
    labels, cameras = file.tensor("pseudo_labels"), file.tensor("cams")
    memory, proxy_clusters, proxy_cameras = proxies(file, labels, cameras)
    row = {pair: i for i, pair in enumerate(zip(proxy_clusters.tolist(), proxy_cameras.tolist(), strict=True))}
    tag = "intra_plus_inter" if inter else "intra"
    for step, index in enumerate(file.tensor("indexes")):
        x = file.tensor("inputs")[step].requires_grad_()
        y, a = labels[index], cameras[index]
        batch = x, y, a, memory.clone(), proxy_clusters, proxy_cameras
        loss = proxy_nce(*batch, scope="camera", reduction="camera", normalize=False)
        if inter:
            loss = loss + 0.5 * proxy_nce(*batch, reduction="camera", normalize=False, compat=True)
        loss.backward()
        torch.testing.assert_close(loss.detach(), file.tensor(f"loss_{tag}")[step], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x.grad, file.tensor(f"grad_{tag}")[step], rtol=1e-4, atol=2e-6)
        rows = torch.tensor([row[pair] for pair in zip(y.tolist(), a.tolist(), strict=True)])
        momentum_update_(memory, x, rows, momentum=0.2)
        if f"memory_after_step{step + 1}_{tag}" in file:
            expected = file.tensor(f"memory_after_step{step + 1}_{tag}")
            torch.testing.assert_close(memory, expected, atol=1e-6 * (step + 1), rtol=0)


@pytest.mark.parametrize("name", ["ice_losses_many_proxies", "ice_losses_few_proxies"])
def test_golden_ice(golden, name):
    file = golden(name)
    memory, proxy_clusters, proxy_cameras = proxies(file, file.tensor("all_pseudo_labels"), file.tensor("all_cams"))
    x = file.tensor("inputs").requires_grad_()

    def loss(memory):
        where = file.tensor("targets"), file.tensor("cams_batch"), memory, proxy_clusters, proxy_cameras
        return 0.5 * proxy_nce(x, *where, reduction="camera", compat=True)

    published = loss(F.normalize(memory, dim=0))  # every column scaled, where the paper scales every row
    published.backward()
    torch.testing.assert_close(published.detach(), file.tensor("loss_cam"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, file.tensor("grad_cam"), rtol=1e-4, atol=2e-6)
    meant = file.meta["params"]["loss_cam_if_each_prototype_were_normalised"]
    assert loss(memory).item() == pytest.approx(meant, rel=1e-5)


def by_hand(x, y, a, memory, proxy_clusters, proxy_cameras, *, temperature, hard, scope, positives, compat):
    """The loss of each sample with Python lists."""
    losses = []
    for b in range(len(x)):
        logit = (F.normalize(x[b], dim=0) @ memory.T / temperature).tolist()
        there = [q for q in range(len(memory)) if scope == "all" or proxy_cameras[q] == a[b]]
        pulled = [q for q in there if proxy_clusters[q] == y[b]]
        if positives == "other_cameras":
            pulled = [q for q in pulled if proxy_cameras[q] != a[b]]
        pushed = sorted((q for q in there if proxy_clusters[q] != y[b]), key=lambda q: -logit[q])
        if scope == "all" and hard is not None:
            if compat and len(pushed) < hard:
                pushed = pushed + pulled[max(len(pulled) - (hard - len(pushed)), 0) :]
            pushed = pushed[:hard]
        total = torch.tensor([logit[q] for q in pulled + pushed]).double().logsumexp(0).item()
        losses.append(sum(total - logit[q] for q in pulled) / len(pulled) if pulled else 0.0)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("hard", [1, 3, 11, 12, 14, 50, None])
@pytest.mark.parametrize(
    ("scope", "positives", "compat"),
    [("all", "all", False), ("all", "all", True), ("all", "other_cameras", False), ("camera", "all", False)],
)
def test_by_hand(batch, hard, scope, positives, compat):
    samples = batch(17)
    settings = {"temperature": 0.3, "scope": scope, "positives": positives, "compat": compat}
    expected = by_hand(*samples, hard=hard, **settings)
    each = proxy_nce(*samples, hard_negatives=hard, reduction="none", **settings)
    torch.testing.assert_close(each, expected)
    cameras = samples[2]
    sums = {
        "mean": expected.mean(),
        "sum": expected.sum(),
        "camera": sum(expected[cameras == camera].mean() for camera in cameras.unique()),
    }
    for reduction, total in sums.items():
        found = proxy_nce(*samples, hard_negatives=hard, reduction=reduction, **settings)
        torch.testing.assert_close(found, total)


@pytest.mark.parametrize(
    "settings", [{}, {"scope": "camera"}, {"positives": "other_cameras"}, {"compat": True}], ids=str
)
def test_gradcheck(batch, settings):
    x, y, *rest = batch(5, 4)
    y[2] = -1

    def loss(x):
        return proxy_nce(x, y, *rest, temperature=0.3, hard_negatives=11, reduction="camera", **settings)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))


def test_one_camera_and_every_negative_is_cluster_contrast(batch):
    x, y, a, memory, clusters, cameras = batch(cameras=1)
    expected = F.cross_entropy(F.normalize(x) @ memory.T / 0.07, y)
    for settings in ({"scope": "camera"}, {"hard_negatives": None}, {"hard_negatives": 50}):
        torch.testing.assert_close(proxy_nce(x, y, a, memory, clusters, cameras, **settings), expected)


def test_a_camera_with_one_proxy_costs_nothing_within_it(batch):
    x, y, a, memory, clusters, cameras = batch()
    y[0], a[0] = 3, 7
    memory, clusters, cameras = (
        torch.cat([old, new]) for old, new in ((memory, memory[:1]), (clusters, y[:1]), (cameras, a[:1]))
    )
    each = proxy_nce(x, y, a, memory, clusters, cameras, scope="camera", reduction="none")
    assert each[0] == 0
    assert (each[1:] > 0).all()


def test_numbers_of_clusters_and_cameras_are_only_names(batch):
    x, y, a, memory, clusters, cameras = batch()
    for settings in ({}, {"scope": "camera"}, {"positives": "other_cameras"}):
        expected = proxy_nce(x, y, a, memory, clusters, cameras, reduction="camera", **settings)
        renamed = proxy_nce(
            x, 1000 - 7 * y, 3 * a - 90, memory, 1000 - 7 * clusters, 3 * cameras - 90, reduction="camera", **settings
        )
        order = torch.randperm(len(memory), generator=torch.Generator().manual_seed(0))
        shuffled = proxy_nce(x, y, a, memory[order], clusters[order], cameras[order], reduction="camera", **settings)
        torch.testing.assert_close(renamed, expected)
        torch.testing.assert_close(shuffled, expected)


def test_alone_in_its_camera_counts_in_the_mean(batch):
    x, y, a, memory, clusters, cameras = batch()
    left = (clusters != y[0]) | (cameras == a[0])
    rest = memory[left], clusters[left], cameras[left]
    each = proxy_nce(x, y, a, *rest, positives="other_cameras", reduction="none")
    assert each[0] == 0
    torch.testing.assert_close(proxy_nce(x, y, a, *rest, positives="other_cameras"), each.sum() / len(x))


@pytest.mark.parametrize("reduction", ["mean", "camera", "sum"])
def test_ignored_samples_take_no_part(batch, reduction):
    x, y, a, *rest = batch()
    kept = torch.tensor([0, 3, 4, 8])
    some = torch.full_like(y, -1)
    some[kept] = y[kept]
    expected = proxy_nce(x[kept], y[kept], a[kept], *rest, reduction=reduction)
    torch.testing.assert_close(proxy_nce(x.requires_grad_(), some, a, *rest, reduction=reduction), expected)
    (gradient,) = torch.autograd.grad(proxy_nce(x, some, a, *rest, reduction=reduction), x)
    assert (gradient[some == -1] == 0).all()
    renamed = torch.where(some == -1, 255, some)
    torch.testing.assert_close(proxy_nce(x, renamed, a, *rest, ignore_index=255, reduction=reduction), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"scope": "camera"}, {"positives": "other_cameras"}, {"compat": True}], ids=str
)
def test_ignored_samples_may_hold_anything(batch, settings):
    x, y, *rest = batch()
    y[[2, 5]] = -1
    grads = []
    for garbage in (x[[2, 5]], torch.tensor([[torch.nan], [torch.inf]], dtype=x.dtype)):
        leaf = x.clone()
        leaf[[2, 5]] = garbage
        proxy_nce(leaf.requires_grad_(), y, *rest, **settings).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert (grads[1][[2, 5]] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "camera", "sum"])
def test_nobody_left_and_nobody_there(batch, reduction):
    x, y, a, *rest = batch()
    x.requires_grad_()
    loss = proxy_nce(x, torch.full_like(y, -1), a, *rest, reduction=reduction)
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    loss = proxy_nce(x[:0], y[:0], a[:0], *rest, reduction=reduction)
    assert loss == 0
    loss.backward()
    assert (x.grad == 0).all()
    assert proxy_nce(x[:0], y[:0], a[:0], *rest, reduction="none").shape == (0,)


def test_zero_rows_nan_and_half_precision(batch):
    x, y, a, *rest = batch(dtype=torch.float32)
    x[2] = 0
    x.requires_grad_()
    proxy_nce(x, y, a, *rest).backward()
    assert torch.isfinite(x.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert proxy_nce(x, y, a, *rest) == proxy_nce(x, y, a, *rest, backend="reference")
    half = proxy_nce(x.half(), y, a, *rest)
    assert half.dtype == torch.float32
    spoilt = x.detach().clone()
    spoilt[4] = torch.nan
    each = proxy_nce(spoilt, y, a, *rest, reduction="none")
    assert each.isnan().tolist() == [b == 4 for b in range(9)]


def test_takes_arrays(batch):
    x, *rest = batch(dtype=torch.float32)
    assert proxy_nce(x.numpy(), *(each.numpy() for each in rest)) == proxy_nce(x, *rest)


NAMES = ("x", "clusters", "cameras", "memory", "proxy_clusters", "proxy_cameras")


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        ({"memory": torch.ones(0, 6)}, {}, ValueError, "memory must have at least one row"),
        ({"memory": torch.ones(15, 5)}, {}, ValueError, "memory must have 6 columns like x"),
        ({"memory": torch.ones(15, 6, requires_grad=True)}, {}, ValueError, "memory must not require grad"),
        ({"x": torch.ones(9, 6, dtype=torch.int64)}, {}, TypeError, "x must be floating point"),
        ({"clusters": torch.ones(9)}, {}, TypeError, "clusters must hold integers"),
        ({"clusters": torch.ones(8, dtype=torch.int64)}, {}, ValueError, "clusters must have one entry for each row"),
        ({"cameras": torch.ones(9, 1, dtype=torch.int64)}, {}, ValueError, "cameras must be 1-D"),
        ({"proxy_clusters": torch.arange(9)}, {}, ValueError, "proxy_clusters must have one entry"),
        ({"proxy_cameras": torch.arange(9)}, {}, ValueError, "proxy_cameras must have one entry"),
        ({"clusters": torch.arange(9)}, {}, ValueError, "clusters must have a proxy each, got cluster 5 without one"),
        ({"cameras": torch.full((9,), 4)}, {"scope": "camera"}, ValueError,
         r"clusters must have a proxy each in the camera of the sample, got cluster \d in camera 4 without one"),
        ({}, {"temperature": 0}, ValueError, "temperature must be positive"),
        ({}, {"hard_negatives": 0}, ValueError, "hard_negatives must be at least 1"),
        ({}, {"hard_negatives": 2.5}, TypeError, "hard_negatives must be an integer"),
        ({}, {"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ({}, {"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
        ({"x": torch.ones(9, 6).to(torch.float8_e4m3fn)}, {}, TypeError, "x must be floating point of 16 bits or more"),
        ({}, {"scope": "mine"}, ValueError, "scope must be one of 'all', 'camera'"),
        ({}, {"positives": "own"}, ValueError, "positives must be one of 'all', 'other_cameras'"),
        ({}, {"scope": "camera", "positives": "other_cameras"}, ValueError, "positives must be 'all' with scope"),
        ({}, {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)  # fmt: skip
def test_rejects(batch, change, settings, error, message):
    arguments = dict(zip(NAMES, batch(dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match=f"proxy_nce: {message}"):
        proxy_nce(**arguments, **settings)

# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of a training step together: the published ten steps, launches, grids.

And what only a GPU can tell: large addresses, other devices, other streams.
"""

import pytest
import torch
import torch.nn.functional as F

from fastreid_u.kernels import cluster_nce as nce
from fastreid_u.kernels import momentum_update as update
from fastreid_u.kernels import proxy_nce as proxies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULES = {"cm": "sequential", "hard": "hard"}
ROWS, D, T = 2**20 + 1, 2048, 0.1  # the last row begins at element 2**31


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("published", ["cm", "hard"])
def test_ten_steps_golden(golden, published):
    file = golden("cm_trajectory_b32_d64_k24")
    memory = file.tensor("features_before").to(DEVICE)
    after = dict(zip((1, 2, 3, 5, 10), file.tensor(f"features_each_step_{published}_m0.1"), strict=True))
    for step in range(10):
        x = file.tensor("inputs")[step].to(DEVICE).requires_grad_()
        targets = file.tensor("targets")[step].to(DEVICE)
        loss = nce.cluster_nce(x, targets, memory)
        (gradient,) = torch.autograd.grad(loss, x)
        update.momentum_update_(memory, x.detach(), targets, momentum=0.1, rule=RULES[published])
        assert loss.item() == pytest.approx(file[f"loss_{published}_m0.1"][step].item(), rel=1e-5, abs=1e-6)
        if step + 1 in after:
            torch.testing.assert_close(memory.cpu(), after[step + 1], atol=5e-6 if step == 9 else 1e-6, rtol=0)
    torch.testing.assert_close(gradient.cpu(), file.tensor(f"grad_last_{published}_m0.1"), rtol=1e-4, atol=2e-6)


@pytest.fixture
def step_on_meta(launches, torch_calls):
    """``run(b, c, d)``: launches and bytes of scratch of one step. Meta tensors refuse every read by the host."""

    def run(b, c, d):
        made = launches(nce.logits, nce.loss, nce.backward, update)
        x = torch.zeros(b, d, device="meta", requires_grad=True)
        targets, memory = torch.zeros(b, dtype=torch.int64, device="meta"), torch.zeros(c, d, device="meta")
        found_inf, upstream = torch.zeros(1, device="meta"), torch.zeros((), device="meta")
        with torch_calls() as calls:
            nce.cluster_nce(x, targets, memory).backward(upstream)
            update.momentum_update_(memory, x.detach(), targets, found_inf=found_inf)
        assert calls.computed == []  # each would be one more launch
        return len(made), calls.bytes - x.nbytes  # less the gradient

    return run


def test_a_step_is_four_launches_and_reads_nothing_back(step_on_meta):
    launched, _ = step_on_meta(256, 700, 2048)
    assert launched == 4


def test_lean_memory_is_bounded(step_on_meta):
    _, scratch = step_on_meta(256, 1_000_000, 384)
    assert 2**20 < scratch <= 64 * 2**20


@pytest.mark.parametrize("rows", [700, 5_000_000])
@pytest.mark.parametrize("b", [1, 256])
def test_grids_fit_however_many_rows(launches, b, rows):
    """A GPU takes 2**31 - 1 programs along the first axis of a grid and 65,535 along the others."""
    made = launches(nce.logits, nce.loss, nce.backward, update, proxies.forward, proxies.backward)
    x = torch.zeros(b, 256, device="meta", requires_grad=True)
    memory = torch.zeros(rows, 256, device="meta", requires_grad=True)
    targets, of_row = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (b, rows))
    for lean in (False, True):
        nce.cluster_nce(x, targets, memory, lean=lean).backward()
    for settings in ({"hard_negatives": 50}, {"hard_negatives": None}, {"scope": "camera"}):
        proxies.proxy_nce(x, targets, targets, memory.detach(), of_row, of_row, **settings).backward()
    for rule in ("sequential", "push"):
        update.momentum_update_(memory.detach(), x.detach(), targets, rule=rule)
    assert len(made) >= 16
    for _, (first, *others) in made:
        assert 1 <= first < 2**31
        assert all(1 <= other < 2**16 for other in others)


@pytest.fixture
def large():
    """A memory of zeros but for its last row, and that row in float64."""
    need = 20e9
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 1e9:.0f} GB of free memory on the GPU")
    memory = torch.zeros(ROWS, D, dtype=torch.float16, device="cuda")
    memory[-1, :2] = torch.tensor([0.6, 0.8], device="cuda")
    return memory, memory[-1].double()


def batch():
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 40
    return x.cuda()


def expected(x, row, others):
    """Loss and gradients towards ``row``, beside ``others`` rows of zeros."""
    x, row = x.double().requires_grad_(), row.clone().requires_grad_()
    logit = F.normalize(x, dim=1) @ row / T
    loss = ((others + logit.exp()).log() - logit).mean()
    return loss.detach(), *torch.autograd.grad(loss, (x, row))


def assert_near(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("lean", [False, True])
def test_cluster_nce_past_two_to_the_31(large, lean):
    memory, row = large
    x, targets = batch().requires_grad_(), torch.full((3,), ROWS - 1, device="cuda")
    memory.requires_grad_()
    loss = nce.cluster_nce(x, targets, memory, temperature=T, lean=lean)
    loss.backward()
    for found, wanted in zip(
        (loss.detach(), x.grad, memory.grad[-1]), expected(x.detach(), row, ROWS - 1), strict=True
    ):
        assert_near(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("hard_negatives", [50, None])
def test_proxy_nce_past_two_to_the_31(large, hard_negatives):
    memory, row = large
    x, clusters = batch().requires_grad_(), torch.arange(ROWS, device="cuda")
    ids = torch.full((3,), ROWS - 1, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    loss = proxies.proxy_nce(
        x, *ids, memory, clusters, torch.zeros_like(clusters), temperature=T, hard_negatives=hard_negatives
    )
    loss.backward()
    wanted = expected(x.detach(), row, hard_negatives or ROWS - 1)
    assert_near(loss.detach(), wanted[0])
    assert_near(x.grad, wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["sequential", "index", "push"])
def test_momentum_update_past_two_to_the_31(large, rule):
    memory, row = large
    x, targets = batch()[:1], torch.full((1,), ROWS - 1, device="cuda")
    index = torch.full((ROWS,), -1, device="cuda")
    index[-1] = 0
    update.momentum_update_(memory, x, targets, rule=rule, index=index, push_weight=0.0)
    sample = F.normalize(x.double(), dim=1)[0]
    pull = 1 - sample @ row if rule == "push" else 1  # 0.1 of the row and 0.9 of the sample, or 0.9 (1 - s) of the way
    wanted = F.normalize(row - 0.9 * pull * (row - sample), dim=0)
    torch.testing.assert_close(memory[-1].double(), wanted, atol=2e-3, rtol=0)
    assert memory[:-1].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2**21 + 33, 2**22 + 65])
def test_more_rows_than_a_second_axis_of_a_grid_has_tiles(rows):
    """All rows are zeros but the last two: what a program of the last tile does shows in the result."""
    memory = torch.zeros(rows, 16, device="cuda")
    memory[-2:, :2] = torch.tensor([[0.6, 0.8], [0.8, 0.6]], device="cuda")
    x, last = batch()[:1, :16], torch.full((1,), rows - 1, device="cuda")
    own, row = torch.arange(rows, device="cuda"), memory[-1].double()
    sample = F.normalize(x.double(), dim=1)[0]
    loss = proxies.proxy_nce(x, last, last, memory, own, own, temperature=T, hard_negatives=1)
    logit = memory[-2:].double() @ sample / T
    assert_near(loss, logit.logsumexp(0) - logit[1])
    loss = nce.cluster_nce(x.requires_grad_(), last, memory, temperature=T, lean=True)
    loss.backward()
    assert_near(x.grad, gradient_beside_zeros(x, memory[-2:], rows - 2))
    update.momentum_update_(memory, x.detach(), last, rule="push", momentum=0.1, push_weight=0.5)
    shove = 0.5 * (1 + 0.96) * (row + memory[-2].double())
    torch.testing.assert_close(
        memory[-1].double(),
        F.normalize(row - 0.9 * (1 - sample @ row) * (row - sample) - shove, dim=0),
        atol=1e-5,
        rtol=0,
    )


def gradient_beside_zeros(x, near, others):
    """Of the loss of one sample whose class is the last row of ``near``, beside ``others`` rows of zeros."""
    x = x.detach().double().requires_grad_()
    logit = F.normalize(x, dim=1) @ near.double().T / T
    loss = (others + logit.exp().sum()).log() - logit[0, -1]
    return torch.autograd.grad(loss, x)[0]


def step(device):
    x, memory = batch().to(device).requires_grad_(), F.normalize(torch.eye(9, D)).to(device)
    targets = torch.tensor([0, 3, 8], device=device)
    nce.cluster_nce(x, targets, memory).backward()
    update.momentum_update_(memory, x.detach(), targets, rule="hard")
    return x.grad.cpu(), memory.cpu()


@pytest.mark.gpu
def test_a_step_on_another_stream():
    wanted = step("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        found = step("cuda")
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_step_on_a_device_that_is_not_the_current_one():
    wanted = step("cuda:0")
    for one, other in zip(step("cuda:1"), wanted, strict=True):
        torch.testing.assert_close(one, other)

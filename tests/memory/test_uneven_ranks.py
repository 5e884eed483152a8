# SPDX-License-Identifier: Apache-2.0
"""Ranks whose batches differ: other numbers of rows are one batch all the same, other kinds an error on all ranks."""

import itertools
import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist

from fastreid_u import ranks
from fastreid_u.memory import ClusterMemory, InstanceMemory, ProxyMemory, gather_in_rank_order
from fastreid_u.recipe import Batch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, to start ranks in milliseconds")

SPLITS = [(16, 9), (9, 16), (25, 0), (0, 25), (24, 1), (0, 0)]
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int16, torch.int32,
    torch.int64,
)  # fmt: skip
ROWS, WIDTH = 10, 16
generator = torch.Generator().manual_seed(0)
X, CENTROIDS = torch.randn(25, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)
TARGETS = torch.arange(25) % ROWS


def memories():
    ids = torch.arange(ROWS)
    instance = InstanceMemory.from_features(CENTROIDS)
    instance.set_labels(ids // 3)
    return {
        "cluster": ClusterMemory.from_centroids(CENTROIDS),
        "instance": instance,
        "proxy": ProxyMemory.from_features(CENTROIDS, ids // 3, ids % 3),
    }


def share(rank, split):
    return slice(0, split[0]) if rank == 0 else slice(split[0], sum(split))


def one_call(memory, x, targets):
    wanted = isinstance(x, torch.Tensor) and x.is_floating_point()
    memory(x.clone().requires_grad_() if wanted else x, targets).backward()
    return memory.features


def words(call, *args):
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def bad_batches(rank):
    """What rank 1 does wrong, by name, as the (x, targets) of this rank."""
    x, targets, odd = X[:4], TARGETS[:4], rank == 1
    return {
        "float64": (x.double() if odd else x, targets),
        "bfloat16": (x.bfloat16() if odd else x, targets),
        "another width": (x[:, :8] if odd else x, targets),
        "a target out of range": (x, targets + 9 * odd),
        "targets that are no integers": (x, targets.float() if odd else targets),
        "a target too few": (x, targets[: 4 - odd]),
        "rows without a second dimension": (x[0] if odd else x, targets),
        "NaN": (x / (0.0 if odd else 1.0), targets),
        "no features": (None if odd else x, targets),
        "features that are integers": (x.long() if odd else x, targets),
        "features that are sparse": (x.to_sparse() if odd else x, targets),
    }


def without_gradient():
    """Batches of a rank whose features require no grad, and how many rows each adds to the step."""
    with torch.inference_mode():
        made = X[:4] * 1
    return {"detached": X[:4], "empty": X[:0], "array": X[:4].numpy(), "of inference mode": made}


def step(memory, x, targets):
    """The loss and the memory behind its backward, which every rank runs, with or without a gradient of its own."""
    loss = memory(x, targets)
    loss.backward()
    return loss.detach(), memory.features


def work(rank):
    found = {}
    for split in SPLITS:
        part = share(rank, split)
        for name, memory in memories().items():
            found["one call", name, split] = one_call(memory, X[part], TARGETS[part])
        memory = memories()["cluster"]
        memory.update_(*gather_in_rank_order(X[part], TARGETS[part]))
        found["apart", "cluster", split] = memory.features
    for dtype in DTYPES:
        for rows in ((3, 5), (0, 2), (0, 0)):
            found["dtype", dtype, rows] = gather_in_rank_order(torch.full((rows[rank], 2), rank).to(dtype))[0]
    for name, (x, targets) in bad_batches(rank).items():
        found["one call", name] = words(one_call, memories()["cluster"], x, targets)
        found["other memories", name] = [words(one_call, memories()[m], x, targets) for m in ("instance", "proxy")]
        found["apart", name] = words(lambda x=x, t=targets: memories()["cluster"].update_(*gather_in_rank_order(x, t)))
    for (kind, x), name in itertools.product(without_gradient().items(), memories()):
        x = x if rank else X.clone().requires_grad_()
        found["step", kind, name] = step(memories()[name], x, TARGETS[: len(x)])
    frozen = memories()["cluster"]
    found["frozen"] = frozen(X, TARGETS).requires_grad, frozen.features
    with torch.no_grad():
        found["alone"] = frozen(X, TARGETS) if rank == 0 else None  # as an evaluation on one rank
    found["index"] = words(one_call, ClusterMemory(WIDTH, ROWS, rule="index" if rank else None), X, TARGETS)
    found["number"] = words(gather_in_rank_order, *[X] * (1 + rank))
    found["no tensor"] = words(gather_in_rank_order, "x" if rank else X)
    found["no rows"] = words(gather_in_rank_order, torch.tensor(1.0) if rank else X)
    cameras = TARGETS[:4] if rank == 0 else None
    found["batch"] = words(ranks.gather_batch, X[:4], Batch((), TARGETS[:4], TARGETS[:4], cameras))
    found["outputs"] = words(ranks.gather_batch, X[:4].to(DTYPES[2 + rank]), Batch((), TARGETS[:4], TARGETS[:4]))
    found["afterwards"] = one_call(memories()["cluster"], X, TARGETS)  # an error leaves the ranks in step
    return found


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What two processes found; they start once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    for memory in memories().values():
        one_call(memory, X, TARGETS)  # before the fork: compiles what the ranks then find in the cache
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("form", "name"), [("one call", n) for n in memories()] + [("apart", "cluster")])
def test_batches_of_other_sizes_make_the_memory_of_one_process(answers, form, name, split):
    alone = memories()[name]
    alone.update_(X[: sum(split)], TARGETS[: sum(split)])
    for found in answers:
        assert torch.equal(found[form, name, split], alone.features)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_dtype_arrive_in_rank_order(answers, dtype):
    for found in answers:
        for rows in ((3, 5), (0, 2), (0, 0)):
            expected = torch.arange(2).repeat_interleave(torch.tensor(rows))[:, None].expand(-1, 2).to(dtype)
            assert torch.equal(found["dtype", dtype, rows], expected)


EQUAL = "tensors must be as many, and equal in dtype, device and size of a row, on every rank"
WRONG = {
    "float64": (EQUAL, EQUAL),
    "bfloat16": (EQUAL, EQUAL),
    "another width": ("memory must have 8 columns", EQUAL),
    "a target out of range": ("targets must lie in [0, 10), got 12", "targets must lie in [0, 10), got 12"),
    "targets that are no integers": ("targets must hold integers, got torch.float32", EQUAL),
    "a target too few": ("targets must have one entry for each row of x (4), got 3", "one entry for each row of x (8)"),
    "rows without a second dimension": ("x must be 2-D, got shape (16,)", EQUAL),
    "NaN": ("x must be finite, got NaN or infinity", "x must be finite, got NaN or infinity"),
    "no features": ("Memory: x must be a tensor", "tensors must be a tensor or an array"),
    "features that are integers": ("Memory: x must be floating point, got torch.int64", EQUAL),
    "features that are sparse": ("x must be dense, got torch.sparse_coo", "tensors must be dense"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_one_rank_is_said_on_both(answers, name):
    for found in answers:
        for form, rule in zip(("one call", "apart"), WRONG[name], strict=True):
            assert rule in found[form, name]
        for heard in found["other memories", name]:
            assert "Error: " in heard


@pytest.mark.parametrize("memory", memories())
@pytest.mark.parametrize("kind", without_gradient())
def test_ranks_with_and_without_gradient_take_one_step(answers, kind, memory):
    x = torch.as_tensor(without_gradient()[kind])
    whole = torch.cat([X, x]), torch.cat([TARGETS, TARGETS[: len(x)]])
    alone = memories()[memory]
    alone.update_(*whole)
    for found, own in zip(answers, (X, x), strict=True):
        loss, features = found["step", kind, memory]
        assert torch.equal(features, alone.features)
        assert torch.equal(loss, memories()[memory].loss(own, TARGETS[: len(own)]))


def test_where_no_rank_wants_a_gradient_nothing_moves(answers):
    for found in answers:
        wanted, features = found["frozen"]
        assert not wanted
        assert torch.equal(features, memories()["cluster"].features)
        assert "rule must not be 'index' in one call" in found["index"]
    assert torch.equal(answers[0]["alone"], memories()["cluster"].loss(X, TARGETS))


def test_the_other_rank_hears_which_rank_failed(answers):
    heard = "ValueError: ClusterMemory: input must be valid on every rank, got a fault on rank 1: ValueError: "
    assert answers[0]["one call", "a target out of range"].startswith(heard + "cluster_nce: targets must lie in")
    assert answers[1]["one call", "a target out of range"].startswith("ValueError: cluster_nce: targets must lie in")


def test_what_cannot_be_gathered_is_an_error_on_both(answers):
    for found in answers:
        assert f"ValueError: gather_in_rank_order: {EQUAL}, got float32 rows of (16,) on cpu" in found["number"]
        assert "gather_in_rank_order: tensors must be a tensor or an array" in found["no tensor"]
        assert "tensors must have a first dimension, got a single number" in found["no rows"]
        assert f"ValueError: gather_batch: {EQUAL}" in found["batch"]
        assert f"ValueError: gather_batch: {EQUAL}" in found["outputs"]


def test_ranks_are_in_step_behind_an_error(answers):
    alone = memories()["cluster"]
    alone.update_(X.repeat(2, 1), TARGETS.repeat(2))
    for found in answers:
        assert torch.equal(found["afterwards"], alone.features)

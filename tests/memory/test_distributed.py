# SPDX-License-Identifier: Apache-2.0
"""Under torch.distributed every rank's memory equals, to the bit, that of one process that sees the whole batch."""

import itertools
import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist

from fastreid_u.memory import ClusterMemory, InstanceMemory, ProxyMemory, gather_in_rank_order

FORMS = "one call", "apart"
STEPS, BATCH, ROWS, WIDTH = 3, 12, 10, 16


def workload():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, BATCH, WIDTH, generator=generator)
    targets = torch.randint(-1, ROWS, (STEPS, BATCH), generator=generator)
    return torch.randn(ROWS, WIDTH, generator=generator), x, targets


def memories(rows):
    ids = torch.arange(ROWS)
    instance = InstanceMemory.from_features(rows)
    instance.set_labels(ids // 3)
    yield "cluster", ClusterMemory.from_centroids(rows)
    yield "hard", ClusterMemory.from_centroids(rows, use_hard=True)
    yield "push", ClusterMemory.from_centroids(rows, rule="push")
    yield "instance", instance
    yield "proxy", ProxyMemory.from_features(rows, ids // 3, ids % 3)


def train(rank, world, form="one call"):
    """What the memories hold after some steps on this rank's share of the batches."""
    rows, x, targets = workload()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    found = {}
    for name, memory in memories(rows):
        for step in range(STEPS):
            leaf = x[step, share].clone().requires_grad_()
            if form == "one call":
                memory(leaf, targets[step, share]).backward()
            else:
                memory.update_(*gather_in_rank_order(leaf, targets[step, share]))
        found[name] = dict(memory.named_buffers())
    return found


def run_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ranks, numbers = gather_in_rank_order(torch.full((2, 3), rank, dtype=torch.float16), torch.tensor([rank, -rank]))
    seen = {"ranks": ranks, "numbers": numbers, **{form: train(rank, world, form) for form in FORMS}}
    alone = ClusterMemory.from_centroids(torch.eye(2))
    alone.update_(torch.ones(1, 2), [rank % 2])  # moves towards what it is given, and waits for no other rank
    seen["own"] = alone.features
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks, to start ranks in milliseconds")
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_has_the_memory_of_one_process(tmp_path, world):
    alone = train(0, 1)  # before the fork: compiles what the ranks then find in the cache
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, world, tmp_path)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * world
    for rank in range(world):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen["ranks"][:, 0].tolist() == [r for r in range(world) for _ in range(2)]
        assert seen["numbers"].tolist() == [r for each in range(world) for r in (each, -each)]
        assert torch.equal(seen["own"][1 - rank % 2], torch.eye(2)[1 - rank % 2])
        for form, (name, buffers) in itertools.product(FORMS, alone.items()):
            for buffer, expected in buffers.items():
                assert torch.equal(seen[form][name][buffer], expected), f"{buffer} of {name}, {form}, on rank {rank}"


def test_alone_nothing_is_gathered():
    x, targets = torch.ones(2, 3), torch.tensor([0, 1])
    assert gather_in_rank_order(x, targets) == (x, targets)
    assert gather_in_rank_order(x, [0, 1])[1].tolist() == [0, 1]

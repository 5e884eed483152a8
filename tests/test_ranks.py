# SPDX-License-Identifier: Apache-2.0
"""A step on several ranks: outputs, batch, loss, gradients and memory are, to the bit, those of one process."""

import multiprocessing
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastreid_u
from fastreid_u import ranks
from fastreid_u.memory import ClusterMemory
from fastreid_u.recipe import Batch

IMAGES, LABELLED, WIDTH, ROWS, STEPS = 13, 6, 8, 5, 3  # neither count can be dealt out evenly to 4 ranks


class Outputs(NamedTuple):
    own: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    labelled: torch.Tensor


def share(count, rank, world):
    return slice(count * rank // world, count * (rank + 1) // world)


def images(step, of, count):
    return torch.randn(count, 3, WIDTH, generator=torch.Generator().manual_seed(10 * step + of))


def loaded(step, of, count, rank, world, source=None):
    part = share(count, rank, world)
    indices = torch.arange(count) * 7 + step
    camids = None if of else indices % 3
    return Batch(
        (images(step, of, count)[part],), indices[part], (indices % (ROWS + 1) - 1)[part],
        None if camids is None else camids[part], source,
    )  # fmt: skip


def network(batch, leaves):
    """Looks at each image for itself, as a network without BatchNorm does."""

    def look(views, view):
        x = views[0][:, view].clone().requires_grad_()
        leaves.append(x)
        return x * 1.5

    return Outputs(
        look(batch.views, 0), (look(batch.views, 1), look(batch.views, 2)), look(batch.source.views, 0)
    )  # fmt: skip


def train(rank, world):
    """What this rank's share of some steps comes to, by name."""
    memory = ClusterMemory.from_centroids(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5)))
    found = {}
    for step in range(STEPS):
        leaves = []
        source = loaded(step, 1, LABELLED, rank, world)
        batch = loaded(step, 0, IMAGES, rank, world, source)
        outputs, whole = ranks.gather_batch(network(batch, leaves), batch)
        assert isinstance(outputs, Outputs)
        assert torch.equal(whole.images, batch.images)
        loss = memory.loss(outputs.own, whole.targets) + memory.loss(outputs.labelled, whole.source.targets)
        for part in outputs.parts:
            loss = loss + F.mse_loss(part, whole.camids[:, None].float().expand_as(part))
        loss.backward()
        memory.update_(outputs.own.detach(), whole.targets)
        memory.update_(outputs.labelled.detach(), whole.source.targets)
        facts = whole.indices, whole.targets, whole.camids, whole.source.indices, whole.source.targets
        found[f"whole {step}"] = [outputs.own, *outputs.parts, outputs.labelled, *facts, loss, memory.features.clone()]
        found[f"whole {step}"] = [each.detach() for each in found[f"whole {step}"]]
        found[f"own {step}"] = [leaf.grad for leaf in leaves]
    return found


def run_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save({"facts": (ranks.world_size(), ranks.label_group()), **train(rank, world)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks, to start ranks in milliseconds")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_of_several_ranks_is_that_of_one_process(tmp_path, world):
    alone = train(0, 1)  # before the fork: compiles what the ranks then find in the cache
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(rank, world, tmp_path)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * world
    for rank in range(world):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen.pop("facts") == (world, None if world == 1 else "world")
        for step in range(STEPS):
            for ours, expected in zip(seen[f"whole {step}"], alone[f"whole {step}"], strict=True):
                assert torch.equal(ours, expected)
            for ours, expected in zip(seen[f"own {step}"], alone[f"own {step}"], strict=True):
                assert torch.equal(ours, expected[share(len(expected), rank, world)])


def test_train_refuses_several_ranks_before_it_makes_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"train: torch.distributed must have one rank, as .* got 2; start one"):
        fastreid_u.train("synthetic", logs_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_one_process_gets_back_what_it_gave():
    outputs, batch = (torch.ones(2, 3),), Batch((), torch.arange(2), torch.arange(2))
    found = ranks.gather_batch(outputs, batch)
    assert found[0] is outputs
    assert found[1] is batch
    assert (ranks.world_size(), ranks.label_group()) == (1, None)

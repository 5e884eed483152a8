# SPDX-License-Identifier: Apache-2.0
"""Ranks of torch.distributed that exchange NumPy arrays, and agree on their input before they start."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """One process group as the ops see it.

    Args:
        op: public name, for messages.
        group: a ``torch.distributed`` process group that this process is in, or "world" for the default one.

    Attributes:
        rank, world: which of how many.

    Raises:
        TypeError, ValueError, RuntimeError: no group, not initialised, or a group without this process.
    """

    def __init__(self, op: str, group: object) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{op}: group must belong to torch.distributed, got it not initialised")
        if isinstance(group, str):
            if group != "world":
                raise ValueError(f"{op}: group must be a process group or 'world', got {group!r}")
            group = dist.group.WORLD
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{op}: group must hold this process, got one without it")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{op}: group must be a process group or 'world', got {type(group).__name__}")
        self.op, self.group = op, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        # NCCL carries tensors on GPUs only
        nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def gather(self, own: np.ndarray) -> np.ndarray:
        """Everybody's array, one after the other in the order of ranks, along the first axis, which may differ."""
        if self.world == 1:
            return own.copy()
        length = [int(each) for each in self._collect(torch.tensor([len(own)]))]
        padded = torch.zeros(max(length), *own.shape[1:], dtype=torch.from_numpy(own[:0]).dtype)
        padded[: len(own)] = torch.from_numpy(own)
        found = self._collect(padded)
        return torch.cat([each[:n].cpu() for each, n in zip(found, length, strict=True)]).numpy()

    def from_first(self, x: Tensor) -> Tensor:
        """``x`` as the first rank has it."""
        sent = x.to(self.device)
        dist.broadcast(sent, dist.get_global_rank(self.group, 0), group=self.group)
        return sent.to(x.device)

    def agree(self, error: Exception | None, fingerprint: list[int]) -> None:
        """Raise on every rank if one of them found a fault, or if they were not given the same.

        All ranks have to call it with as many numbers; without it one rank would raise and the others wait for it.
        """
        found = torch.stack(self._collect(torch.tensor([error is not None, *fingerprint], dtype=torch.int64))).cpu()
        if error is not None:
            raise error
        if found[:, 0].any():
            raise ValueError(f"{self.op}: input must be valid on every rank, got a fault on rank {_first(found[:, 0])}")
        other = (found != found[0]).any(dim=1)
        if other.any():
            raise ValueError(
                f"{self.op}: features and settings must be the same on every rank, got others on rank {_first(other)}"
            )

    def _collect(self, own: Tensor) -> list[Tensor]:
        own = own.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own, group=self.group)
        return found


def bits_of(x: Tensor) -> list[int]:
    """Shape and two sums over the bits of a float32 or int64 matrix, to tell whether others hold the same."""
    words = x.contiguous().view(torch.int32)
    row = words.sum(dim=1, dtype=torch.int64)
    return [*x.shape, int(row.sum()), int((row * torch.arange(1, len(row) + 1, device=row.device)).sum())]


def _first(flag: Tensor) -> int:
    return int(flag.nonzero()[0])

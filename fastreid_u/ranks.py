# SPDX-License-Identifier: Apache-2.0
"""The ranks of torch.distributed: how many there are, and what they exchange. No other file asks torch.distributed.

A training on several ranks gives every rank its share of each batch. ``gather_batch`` then hands all ranks the outputs
and the labels of the whole batch, so that losses and memories are those of one process, to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastreid_u._checks import as_tensor

# What checks and computations raise, out of memory included; the other ranks have to hear of it.
FAULTS = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, BufferError, RuntimeError, MemoryError,
)  # fmt: skip


def world_size() -> int:
    """How many ranks there are; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def require_one_rank(op: str) -> None:
    """Raise RuntimeError where there are several ranks: ``op`` would run on each as if alone, with other numbers."""
    if world_size() > 1:
        raise RuntimeError(
            f"{op}: torch.distributed must have one rank, as gradients are not shared yet, got {world_size()}; start "
            "one process, or end the group first"
        )


def label_group() -> str | None:
    """The ``group`` with which ``pseudo_labels`` shares its work over all ranks: None for one process."""
    return "world" if world_size() > 1 else None


def gather_in_rank_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor of every rank, concatenated along its first dimension, rank 0's first; detached.

    All ranks must call this together. They may have different numbers of rows, as where an image of one could not be
    read, and none at all. Without ``torch.distributed``, or with one rank, what was given comes back. Memory: world
    size times the tensors.

    Raises:
        TypeError, ValueError: on every rank, if one was given no tensors, or tensors that differ from rank 0's in
        number, dtype, kind of device or in the size of a row.
    """
    op = "gather_in_rank_order"
    tensors, lengths = agreed_lengths(op, lambda: tuple(as_tensor(op, "tensors", tensor) for tensor in tensors))
    return gather_lengths(tensors, lengths)


def agreed_lengths(op: str, make: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], list[list[int]]]:
    """What ``make`` returns, and of each tensor the number of rows on each rank.

    All ranks must call this together: they tell each other what they have before anything that one would wait for.
    With one rank nothing is exchanged.

    Raises:
        Exception: what ``make`` raised here. ValueError: it raised on another rank, or ranks made tensors that cannot
        be joined.
    """
    if world_size() == 1:
        tensors = make()
        return tensors, [[tensor.shape[0] if tensor.ndim else 1] for tensor in tensors]
    tensors, fault = (), None
    try:
        tensors = make()
        forms = [_form(op, tensor) for tensor in tensors]
    except FAULTS as error:  # raised again as soon as the other ranks have heard of it
        fault, forms = error, []
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (fault and f"{type(fault).__name__}: {fault}", forms))
    if fault is not None:
        raise fault
    for rank, (text, other) in enumerate(found):
        if text is not None:
            raise ValueError(f"{op}: input must be valid on every rank, got a fault on rank {rank}: {text}")
        kinds, own = ([form[1:] for form in each] for each in (other, found[0][1]))
        if kinds != own:
            rule = "tensors must be as many, and equal in dtype, device and size of a row, on every rank"
            raise ValueError(f"{op}: {rule}, got {_listed(own)} on rank 0 and {_listed(kinds)} on rank {rank}")
    return tensors, [[each[i][0] for _, each in found] for i in range(len(forms))]


def gather_lengths(tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Each tensor of every rank, rank 0's first, given how many rows each rank has; detached."""
    if world_size() == 1:
        return tuple(tensors)
    return tuple(torch.cat(_parts(own, each)) for own, each in zip(tensors, lengths, strict=True))


def _form(op: str, tensor: Tensor) -> tuple[int, str, str, tuple[int, ...]]:
    """Rows, and what must be equal on all ranks."""
    if tensor.ndim == 0:
        raise ValueError(f"{op}: tensors must have a first dimension, got a single number")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: tensors must be dense, got {tensor.layout}")
    return len(tensor), str(tensor.dtype).removeprefix("torch."), tensor.device.type, tuple(tensor.shape[1:])


def _listed(kinds: list[tuple]) -> str:
    return ", ".join(f"{dtype} rows of {row} on {device}" for dtype, device, row in kinds) or "none"


def gather_batch(outputs: Any, batch: Any) -> tuple[Any, Any]:
    """A step's outputs and batch of all ranks, rank 0's first; ranks may hold different numbers of images.

    Args:
        outputs: what a network gave for this rank's images: tensors with a row per image, one or a tuple of them.
        batch: this rank's ``recipe.Batch``.

    Returns:
        ``(outputs, batch)`` of the whole batch. Of the outputs, this rank's rows keep their graph and the others have
        none: the gradient of a loss of the whole batch is the sum over ranks of the gradients that each rank finds. Of
        the batch, ``indices``, ``targets`` and ``camids`` are gathered, in ``source`` too; ``views`` stay this rank's.
        With one rank, what was given comes back.

    All ranks must call this together, with the same structure; a ValueError on all of them where it differs. Memory:
    world size times the outputs.
    """
    if world_size() == 1:
        return outputs, batch
    own, lengths = agreed_lengths("gather_batch", lambda: list(_tensors((outputs, _facts(batch)))))
    whole = iter([_joined(each, rows) for each, rows in zip(own, lengths, strict=True)])
    outputs, facts = _put_back((outputs, _facts(batch)), whole)
    return outputs, _with_facts(batch, facts)


def _joined(own: Tensor, lengths: Sequence[int]) -> Tensor:
    """``own`` (n, ...) of all ranks, which have ``lengths`` rows; only this rank's rows have a graph."""
    parts = _parts(own, lengths)
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def _parts(own: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """``own`` (n, ...) of each rank, without graph.

    Bytes travel, which every backend takes, and from every rank as many as the longest has.
    """
    padded = own.detach().new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own.detach()
    sent = padded.flatten().view(torch.uint8)
    found = [torch.empty_like(sent) for _ in lengths]
    dist.all_gather(found, sent)
    return [part.view(own.dtype).view(padded.shape)[:length] for part, length in zip(found, lengths, strict=True)]


def _facts(batch: Any) -> tuple | None:
    """What a loss reads of a batch and of its source batch."""
    return None if batch is None else (batch.indices, batch.targets, batch.camids, _facts(batch.source))


def _with_facts(batch: Any, facts: tuple | None) -> Any:
    if batch is None:
        return None
    indices, targets, camids, source = facts
    source = _with_facts(batch.source, source)
    return dataclasses.replace(batch, indices=indices, targets=targets, camids=camids, source=source)


def _tensors(nested: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, in their order; None holds none."""
    if isinstance(nested, Tensor):
        yield nested
    elif nested is not None:
        for each in nested:
            yield from _tensors(each)


def _put_back(nested: Any, tensors: Iterator[Tensor]) -> Any:
    """``nested`` with the next of ``tensors`` in place of each of its own; a named tuple stays named."""
    if isinstance(nested, Tensor):
        return next(tensors)
    if nested is None:
        return None
    made = [_put_back(each, tensors) for each in nested]
    return type(nested)(*made) if hasattr(nested, "_fields") else tuple(made)


class Ranks:
    """One process group whose members exchange NumPy arrays, and agree on their input before they start.

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
        """The arrays of all ranks, one after the other in their order, along the first axis, which may differ."""
        if self.world == 1:
            return own.copy()
        length = [int(each) for each in self._collect(torch.tensor([len(own)], device="cpu"))]
        padded = torch.zeros(max(length), *own.shape[1:], dtype=torch.from_numpy(own[:0]).dtype, device="cpu")
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
        own = torch.tensor([error is not None, *fingerprint], dtype=torch.int64, device="cpu")
        found = torch.stack(self._collect(own)).cpu()
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
    """Shape and two sums over the bits of a float32 or int64 matrix, to tell whether others hold the same in order."""
    words = x.contiguous().view(torch.int32)
    place = torch.arange(1, words.shape[1] + 1, device=words.device)
    row = torch.cat([(block * place).sum(dim=1) for block in words.split(2**22 // max(len(place), 1) + 1)])
    return [*x.shape, int(row.sum()), int((row * torch.arange(1, len(row) + 1, device=row.device)).sum())]


def _first(flag: Tensor) -> int:
    return int(flag.nonzero()[0])

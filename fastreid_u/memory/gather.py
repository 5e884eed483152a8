# SPDX-License-Identifier: Apache-2.0
"""The batches of all ranks, in an order that all ranks agree on."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastreid_u._checks import as_tensor


def gather_in_rank_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor of every rank, concatenated along its first dimension, rank 0's first; detached.

    All ranks must call this together, with tensors of the same shapes and dtypes. Without ``torch.distributed``, or
    with one rank, what was given comes back. Memory: world size times the tensors.
    """
    tensors = tuple(as_tensor("gather_in_rank_order", "tensors", tensor) for tensor in tensors)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensors
    gathered = []
    for tensor in tensors:
        own = tensor.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        gathered.append(torch.cat(parts))
    return tuple(gathered)

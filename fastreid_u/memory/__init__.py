# SPDX-License-Identifier: Apache-2.0
"""Memories of prototypes: ``nn.Module`` faces of the ops that compare a batch with a memory and move it.

All state lives in buffers, so ``state_dict``, ``to`` and checkpoints see it; a loaded state may have any number of
rows. Every memory has ``loss(x, targets)`` and ``update_(x, targets, found_inf=None)``, to be called after backward;
both work on the batch that they are given. ``memory(x, targets)`` does both as the published classes do, and its update
takes in the batches of all ranks of ``torch.distributed``, in rank order: memories that start equal stay equal to the
bit. So they do where every rank calls ``memory.update_(*gather_in_rank_order(x, targets))``.
"""

from fastreid_u.memory.cluster import ClusterMemory
from fastreid_u.memory.instance import InstanceMemory
from fastreid_u.memory.proxy import ProxyMemory
from fastreid_u.ranks import gather_in_rank_order

__all__ = ["ClusterMemory", "InstanceMemory", "ProxyMemory", "gather_in_rank_order"]

# SPDX-License-Identifier: Apache-2.0
"""How much attention the members of a cluster pay to each other.

The published abstract of CSA + HPS (International Journal of Machine Learning and Cybernetics, 2023) names multi-head
self-attention within a cluster; the details are our design.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_attention(
    query: Tensor, key: Tensor, labels: Tensor, *, heads: int = 8, scale: float | Tensor = 10.0, mask_self: bool = True
) -> Tensor:
    """(N, heads): what each row receives, per head the mean over the rows of its label of their softmax attention.

    Attention of i to j: softmax over the j of i's label of ``scale * heads * <query_i, key_j>`` within a head; i itself
    is left out unless it is alone.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = (rows.to(dtype).reshape(len(rows), heads, rows.shape[1] // heads) for rows in (query, key))
    scale = torch.as_tensor(scale, dtype=dtype, device=query.device).expand(heads)
    received = query.new_zeros(len(query), heads)
    for label in sorted(set(labels.tolist()) - {-1}):
        members = (labels == label).nonzero().flatten()
        for head in range(heads):
            logits = scale[head] * heads * query[members, head] @ key[members, head].T
            if mask_self and len(members) > 1:
                logits = logits.masked_fill(torch.eye(len(members), dtype=torch.bool, device=logits.device), -torch.inf)
            received = received.index_put(
                (members, torch.tensor(head, device=members.device)), logits.softmax(dim=1).mean(dim=0)
            )
    return received

# SPDX-License-Identifier: Apache-2.0
"""How much attention the members of a cluster pay to each other (CSA, HPS).

Plain torch: matrix products do the work, and the blocks below keep heads x n x n from ever being whole. A kernel would
save launches, which matter neither once an epoch nor for the one block that a batch is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastreid_u._checks import (
    as_tensor,
    require_2d,
    require_floating,
    require_ids,
    require_positive,
    require_positive_int,
    require_same_device,
    require_same_length,
    require_same_width,
)
from fastreid_u.reference.products import inner_products

BLOCK = 2**24  # entries of one block of attention over all heads: 64 MiB
GROUP = 256  # rows up to which small segments share a block


def segment_attention(
    query: Tensor, key: Tensor, labels: Tensor, *, heads: int = 8, scale: float | Tensor = 10.0, mask_self: bool = True
) -> Tensor:
    """The attention that each row receives from the rows of its label, per head; it sums to 1 over a label.

    Row i attends to row j of its label with ``A_ij = softmax_j(scale_h * heads * <query_i, key_j>_h)``, the product
    over the columns of head h, and row j receives ``mean_i A_ij``. A member that its cluster seldom attends to is an
    intruder. Uniform attention gives 1 / n.

        received = segment_attention(x, x, labels)                                  # (N, heads)
        weighted = (x.unflatten(1, (8, -1)) * received[:, :, None]).flatten(1)
        prototypes = F.normalize(segment_sum(weighted, labels))                     # CSA; uniform: plain centroids
        dispersion = -torch.log(n * received.mean(dim=1))                           # HPS; 0: as its peers

    Args:
        query, key: (N, D) floating point on one device, D divisible by ``heads``: unit features, projected or not.
        labels: (N,) integers, in any order; -1 takes no part. Segments of any size.
        heads: H, number of equal shares of the columns.
        scale: a positive number, or (H,) tensor, which may require grad. 10 is temperature 0.1 on cosines.
        mask_self: a row does not attend to itself, unless it is alone; the diagonal of unit features would drown the
            rest.

    Returns:
        (N, H) float32 (float64 for float64), zeros at label -1; differentiable with respect to ``query``, ``key`` and
        ``scale``. Memory: a block of at most 64 MiB a few times over; with gradients all blocks, 4 H n² bytes for a
        segment. A batch (H N² <= 2^24) is one block, and a GPU need not be waited for.

    Raises:
        TypeError, ValueError: wrong type, shape or value.
    """
    op = "segment_attention"
    query = require_floating(op, "query", require_2d(op, "query", as_tensor(op, "query", query)))
    key = require_floating(op, "key", require_2d(op, "key", as_tensor(op, "key", key)))
    labels = require_ids(op, "labels", labels)
    require_same_length(op, "key", key, "query", query)
    require_same_width(op, "key", key, "query", query)
    require_same_length(op, "labels", labels, "query", query)
    for name, other in (("key", key), ("labels", labels)):
        require_same_device(op, name, other, "query", query)
    heads = require_positive_int(op, "heads", heads)
    if query.shape[1] % heads:
        raise ValueError(f"{op}: heads must divide the {query.shape[1]} columns of query, got {heads}")
    if isinstance(scale, Tensor):
        if scale.shape not in ((), (heads,)):
            raise ValueError(f"{op}: scale must be a number or hold one for each head, got shape {tuple(scale.shape)}")
    else:
        scale = require_positive(op, "scale", scale)

    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
        scale = torch.as_tensor(scale, dtype=dtype, device=query.device).expand(heads)
        # what takes no part may hold anything, NaN too
        query, key = (each.to(dtype).where(labels[:, None] >= 0, 0) for each in (query, key))
        query = query.unflatten(1, (heads, -1)) * (scale * heads)[:, None]
        key = key.unflatten(1, (heads, -1))
        if heads * len(labels) ** 2 <= BLOCK:
            received = _attend(query, key, labels, labels, 0, mask_self)
        else:
            order = labels.argsort(stable=True)[int((labels < 0).sum()) :]
            ordered, sizes = labels[order], labels[order].unique_consecutive(return_counts=True)[1].tolist()
            parts = [query.new_zeros(0, heads)]
            for columns, blocks in _blocks(sizes, heads):
                keys = key[order[columns]]
                shares = (
                    _attend(
                        query[order[rows]], keys, ordered[rows], ordered[columns], rows.start - columns.start, mask_self
                    )
                    for rows in blocks
                )
                parts.append(sum(shares))
            received = query.new_zeros(len(labels), heads).index_copy(0, order, torch.cat(parts))
        return received.where(labels[:, None] >= 0, 0)


def _blocks(sizes: list[int], heads: int) -> Iterator[tuple[slice, list[slice]]]:
    """Runs of whole segments, as columns, and the runs of rows to attend to them at a time."""
    if not sizes:
        return
    begin = end = 0
    for size, following in zip(sizes, [*sizes[1:], GROUP], strict=True):
        end += size
        if end - begin + following > GROUP:
            step = max(BLOCK // (heads * (end - begin)), 1)
            yield slice(begin, end), [slice(at, min(at + step, end)) for at in range(begin, end, step)]
            begin = end


def _attend(query: Tensor, key: Tensor, of_row: Tensor, of_column: Tensor, offset: int, mask_self: bool) -> Tensor:
    """(columns, heads): what the columns receive from these rows; row r is column ``offset + r``."""
    allowed = of_row[:, None] == of_column[None, :]
    size = allowed.sum(dim=1)
    if mask_self:
        own = torch.arange(len(of_row), device=key.device)[:, None] + offset == torch.arange(
            len(of_column), device=key.device
        )
        allowed = allowed & ~(own & (size > 1)[:, None])
    logits = inner_products(query.transpose(0, 1), key.transpose(0, 1)).masked_fill(~allowed, -torch.inf)
    return (logits.softmax(dim=2) / size[:, None]).sum(dim=1).T

# SPDX-License-Identifier: Apache-2.0
"""Distances in float64 between rows that are named, and their order: distance, then index, a row itself first."""

import torch
import triton
import triton.language as tl

_ENTRIES = 1 << 22  # distances at a time in the exhaustive pass


@triton.jit
def _measure_kernel(
    x_ptr,  # [N, D] fp32
    y_ptr,  # [M, D] fp32
    query_ptr,  # [rows] int64, rows of x
    index_ptr,  # [rows, CAP] int32, rows of y; not read with ALL
    count_ptr,  # [rows] int32; not read with ALL
    dist_ptr,  # [rows, CAP] fp32 out
    D,
    CAP,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL: tl.constexpr,  # every row of y: CAP is M
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.load(query_ptr + row)
    if ALL:
        count = CAP
    else:
        count = tl.load(count_ptr + row)
    for start in range(tl.program_id(1) * BLOCK_E, count, tl.num_programs(1) * BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        if ALL:
            j = e.to(tl.int64)
        else:
            j = tl.load(index_ptr + row * CAP + e, mask=e < count, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_E, BLOCK_D], tl.float64)
        for start_d in range(0, D, BLOCK_D):
            d = start_d + tl.arange(0, BLOCK_D)
            mine = tl.load(x_ptr + i * D + d, mask=d < D, other=0.0).to(tl.float64)
            inside = (e < count)[:, None] & (d < D)[None, :]
            theirs = tl.load(y_ptr + j[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float64)
            gap = mine[None, :] - theirs
            total += gap * gap
        tl.store(dist_ptr + row * CAP + e, tl.sum(total, axis=1).to(tl.float32), mask=e < count)


@triton.jit
def _order_kernel(
    dist_ptr,  # [rows, CAP] fp32
    index_ptr,  # [rows, CAP] int32
    count_ptr,  # [rows] int32
    query_ptr,  # [rows] int64
    out_dist_ptr,  # [N, K] fp32 out, rows ``query`` of it
    out_index_ptr,  # [N, K] int64 out
    K,
    CAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(query_ptr + row)
    count = tl.load(count_ptr + row)
    t = tl.arange(0, CAP)
    dist = tl.load(dist_ptr + row * CAP + t, mask=t < count, other=0.0)
    index = tl.load(index_ptr + row * CAP + t, mask=t < count, other=0).to(tl.int64)
    # bits of a float that is not negative order as the float does: one integer compares distance, then index
    key = (dist.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index
    if ALONE:
        key = tl.where(index == own, -1, key)
    rank = tl.zeros([CAP], tl.int32)
    for start in range(0, count, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        e_dist = tl.load(dist_ptr + row * CAP + e, mask=e < count, other=0.0)
        e_index = tl.load(index_ptr + row * CAP + e, mask=e < count, other=0).to(tl.int64)
        e_key = (e_dist.to(tl.int32, bitcast=True).to(tl.int64) << 32) | e_index
        if ALONE:
            e_key = tl.where(e_index == own, -1, e_key)
        ahead = (e_key[:, None] < key[None, :]) & (e < count)[:, None]
        rank += tl.sum(ahead.to(tl.int32), axis=0)
    chosen = (t < count) & (rank < K)
    tl.store(out_dist_ptr + own * K + rank, dist, mask=chosen)
    tl.store(out_index_ptr + own * K + rank, index, mask=chosen)


def distances(
    x: torch.Tensor, y: torch.Tensor, query: torch.Tensor, index: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """(rows, h) float32: from rows ``query`` of ``x`` to the first ``count`` of their rows ``index`` of ``y``.

    Args:
        query: (rows,) int64.
        index: (rows, h) int32.
        count: (rows,) int32; what is behind it stays as it is.
    """
    index = index.contiguous()
    dist = torch.empty_like(index, dtype=torch.float32)
    _measure_kernel[(len(query), 4)](
        x, y, query, index, count, dist, x.shape[1], index.shape[1], ALL=False, **_block(x)
    )
    return dist


def nearest(
    x: torch.Tensor, y: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, count: torch.Tensor,
    alone: bool, sq_dist: torch.Tensor, index: torch.Tensor,
) -> None:  # fmt: skip
    """Writes rows ``query`` of ``sq_dist`` and ``index``, (N, k): the nearest of ``count`` candidates, k at least.

    ``candidate`` is (rows, cap) int32, cap a power of two. Rows whose count is 0 stay as they are.
    """
    cap = candidate.shape[1]
    dist = distances(x, y, query, candidate, count)
    _order_kernel[(len(query),)](
        dist, candidate, count, query, sq_dist, index, index.shape[1],
        CAP=cap, BLOCK_E=max(1, min(32, 16384 // cap)), ALONE=alone,
    )  # fmt: skip


def against_all(
    x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, alone: bool, sq_dist: torch.Tensor, index: torch.Tensor
) -> None:
    """The exhaustive pass: every distance of these rows, and the k smallest by (distance, index)."""
    m = len(y)
    for query in rows.split(max(1, _ENTRIES // m)) if len(rows) else ():
        dist = torch.empty(len(query), m, dtype=torch.float32, device=x.device)
        chunks = min(triton.cdiv(m, 8), 1024)
        _measure_kernel[(len(query), chunks)](x, y, query, None, None, dist, x.shape[1], m, ALL=True, **_block(x))
        key = (dist.view(torch.int32).long() << 32) | torch.arange(m, device=x.device)
        if alone:
            key[torch.arange(len(query), device=x.device), query] = -1
        found = key.topk(index.shape[1], dim=1, largest=False, sorted=True).values
        place = torch.where(found < 0, query[:, None], found & 0xFFFFFFFF)
        sq_dist[query], index[query] = dist.gather(1, place), place


def _block(x):
    return {"BLOCK_E": 8, "BLOCK_D": min(256, triton.next_power_of_2(x.shape[1])), "num_warps": 4}

# SPDX-License-Identifier: Apache-2.0
"""The backward: the gradient to the features, over the few rows that were chosen or over the whole memory."""

import torch
import triton
import triton.language as tl

from .layout import COEFFICIENT, EPS, INV_COUNT, INV_NORM, LSE, SLOPE, as_rows, number_bytes, roles
from .settings import PRECISIONS, Settings

NEVER = tl.constexpr(2**31 - 1)
# samples, proxies, columns of a tile, warps; literals, because autotuning would make bits depend on timing
# and by bytes of a number, the largest that keep within the registers of sm_80, sm_90 and sm_100
BACKWARD_TILE = {4: (64, 32, 64, 8), 2: (64, 16, 64, 8)}
GATHER_TILE = (8, 512, 1024, 4)  # rows of the memory at a time, proxies looked at for positives, columns, warps


@triton.jit
def _through_the_norm(grad, x, inv_norm, slope, NORMALIZE: tl.constexpr):
    """From the gradient to x̂ to that to x; a row of (nearly) zero length was not normalised."""
    if NORMALIZE:
        slope = tl.where(inv_norm < 1.0 / EPS, slope, 0.0)
        grad = (grad - x.to(tl.float32) * (inv_norm * slope)) * inv_norm
    return grad


@triton.jit(do_not_specialize=["B", "Q", "hard_negatives", "stride_g"])
def _proxy_nce_gather_kernel(
    logits_ptr,  # [B, Q] fp32
    memory_ptr,  # [Q, D] any float
    x_ptr,  # [B, D] any float
    stats_ptr,  # [5, B] fp32
    chosen_ptr,  # [B, hard_negatives] int32
    counts_ptr,  # [2, B] int32
    clusters_ptr, cameras_ptr, proxy_clusters_ptr, proxy_cameras_ptr,
    grad_ptr,  # [] or [B] float, stride_g apart
    grad_x_ptr,  # [B, D], written
    stride_l, stride_m, stride_x, stride_g, B, Q, D, hard_negatives, scale,
    NORMALIZE: tl.constexpr, POSITIVES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out = grad_x_ptr + b.to(tl.int64) * D + d
    factor = tl.load(stats_ptr + COEFFICIENT * B + b)
    if factor == 0:  # takes no part, and may hold anything
        tl.store(out, tl.zeros([BLOCK_D], grad_x_ptr.dtype.element_ty), mask=d < D)
        return
    factor *= tl.load(grad_ptr + b.to(tl.int64) * stride_g).to(tl.float32)
    lse = tl.load(stats_ptr + LSE * B + b)
    logits_ptr += b.to(tl.int64) * stride_l
    wide_m = tl.cast(stride_m, tl.int64)
    acc = tl.zeros([BLOCK_D], tl.float32)

    chosen_ptr += b.to(tl.int64) * hard_negatives
    count = tl.load(counts_ptr + b)
    for start in range(0, count, ROWS):
        at = start + tl.arange(0, ROWS)
        q = tl.load(chosen_ptr + at, mask=at < count, other=0)
        p = tl.exp(tl.load(logits_ptr + q, mask=at < count, other=float("-inf")) - lse)
        live = (at < count)[:, None] & (d < D)[None, :]
        rows = tl.load(memory_ptr + q.to(tl.int64)[:, None] * wide_m + d[None, :], mask=live, other=0.0)
        acc += tl.sum(p[:, None] * rows.to(tl.float32), axis=0)

    cluster = tl.load(clusters_ptr + b)
    camera = tl.load(cameras_ptr + b)
    inv_count = tl.load(stats_ptr + INV_COUNT * B + b)
    twice_from = tl.load(counts_ptr + B + b)
    for start in range(0, Q, BLOCK):
        q = start + tl.arange(0, BLOCK)
        _, positive, _ = roles(cluster, camera, proxy_clusters_ptr, proxy_cameras_ptr, q, q < Q, "all", POSITIVES)
        one = tl.min(tl.where(positive, q, NEVER))
        while one < NEVER:  # few tiles have any
            times = tl.where(one >= twice_from, 2.0, 1.0)
            c = times * tl.exp(tl.load(logits_ptr + one) - lse) - inv_count
            acc += c * tl.load(memory_ptr + one.to(tl.int64) * wide_m + d, mask=d < D, other=0.0).to(tl.float32)
            one = tl.min(tl.where(positive & (q > one), q, NEVER))

    x = tl.load(x_ptr + b.to(tl.int64) * stride_x + d, mask=d < D, other=0.0)
    inv_norm = tl.load(stats_ptr + INV_NORM * B + b)
    slope = tl.load(stats_ptr + SLOPE * B + b)
    grad = _through_the_norm(acc * scale, x, inv_norm, slope, NORMALIZE) * factor
    tl.store(out, grad.to(grad_x_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _store_grad_x(
    acc, b, d, x_ptr, stats_ptr, grad_ptr, grad_x_ptr, stride_x, stride_g, B, D, scale, NORMALIZE: tl.constexpr
):
    """``acc`` of samples ``b`` and columns ``d`` through the normalisation, times the gradient of the loss."""
    live = (b < B)[:, None] & (d < D)[None, :]
    factor = tl.load(stats_ptr + COEFFICIENT * B + b, mask=b < B, other=0.0)
    kept = factor != 0
    factor *= tl.load(grad_ptr + b.to(tl.int64) * stride_g, mask=b < B, other=0.0).to(tl.float32)
    inv_norm = tl.load(stats_ptr + INV_NORM * B + b, mask=b < B, other=0.0)
    slope = tl.load(stats_ptr + SLOPE * B + b, mask=b < B, other=0.0)
    x = tl.load(x_ptr + b.to(tl.int64)[:, None] * stride_x + d[None, :], mask=live, other=0.0)
    grad = _through_the_norm(acc * scale, x, inv_norm[:, None], slope[:, None], NORMALIZE) * factor[:, None]
    grad = tl.where(kept[:, None], grad, 0.0)
    tl.store(grad_x_ptr + b.to(tl.int64)[:, None] * D + d[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["B", "Q", "tiles", "stride_g"])
def _proxy_nce_grad_x_kernel(
    logits_ptr,  # [B, Q] fp32
    memory_ptr,  # [Q, D] any float
    x_ptr,  # [B, D] any float
    stats_ptr,  # [5, B] fp32
    clusters_ptr, cameras_ptr, proxy_clusters_ptr, proxy_cameras_ptr,
    grad_ptr,  # [] or [B] float, stride_g apart
    partial_ptr,  # [splits, B, D] fp32, written unless FINISH
    grad_x_ptr,  # [B, D], written if FINISH
    stride_l, stride_m, stride_x, stride_g, B, Q, D, scale,
    tiles,  # tiles of BLOCK_Q proxies that one program takes
    NORMALIZE: tl.constexpr, SCOPE: tl.constexpr, POSITIVES: tl.constexpr, FINISH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    takes_part = tl.load(stats_ptr + COEFFICIENT * B + b, mask=b < B, other=0.0) != 0
    cluster = tl.load(clusters_ptr + b, mask=b < B, other=0)[:, None]
    camera = tl.load(cameras_ptr + b, mask=b < B, other=0)[:, None]
    lse = tl.load(stats_ptr + LSE * B + b, mask=b < B, other=0.0)
    inv_count = tl.load(stats_ptr + INV_COUNT * B + b, mask=b < B, other=0.0)
    logits_ptr += (tl.program_id(0) * BLOCK_B).to(tl.int64) * stride_l
    l_offset = tl.arange(0, BLOCK_B)[:, None] * stride_l + tl.arange(0, BLOCK_Q)[None, :]
    wide_m = tl.cast(stride_m, tl.int64)
    m_offset = tl.arange(0, BLOCK_Q)[:, None] * stride_m + d[None, :]
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    begin = split * tiles * BLOCK_Q
    for start in range(begin, tl.minimum(begin + tiles * BLOCK_Q, Q), BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        _, positive, negative = roles(
            cluster, camera, proxy_clusters_ptr, proxy_cameras_ptr, q[None, :], (q < Q)[None, :], SCOPE, POSITIVES
        )
        live = takes_part[:, None] & (q < Q)[None, :]
        logits = tl.load(logits_ptr + start + l_offset, mask=live, other=float("-inf"))
        c = tl.exp(tl.where(positive | negative, logits, float("-inf")) - lse[:, None])
        c = tl.where(live, c - tl.where(positive, inv_count[:, None], 0.0), 0.0)
        rows = memory_ptr + start * wide_m + m_offset
        m = tl.load(rows, mask=(q < Q)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(c, m, acc, input_precision=PRECISION)
    if FINISH:
        _store_grad_x(acc, b, d, x_ptr, stats_ptr, grad_ptr, grad_x_ptr, stride_x, stride_g, B, D, scale, NORMALIZE)
    else:
        out = partial_ptr + (split * B + b)[:, None] * tl.cast(D, tl.int64) + d[None, :]
        tl.store(out, acc, mask=(b < B)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["B", "splits", "stride_g"])
def _proxy_nce_finish_kernel(
    partial_ptr,  # [splits, B, D] fp32
    x_ptr, stats_ptr, grad_ptr, grad_x_ptr,
    stride_x, stride_g, B, D, scale, splits,
    NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (b < B)[:, None] & (d < D)[None, :]
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + (split * B + b)[:, None] * tl.cast(D, tl.int64) + d[None, :], mask=live, other=0.0)
    _store_grad_x(acc, b, d, x_ptr, stats_ptr, grad_ptr, grad_x_ptr, stride_x, stride_g, B, D, scale, NORMALIZE)


def proxy_nce_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    clusters: torch.Tensor,
    cameras: torch.Tensor,
    memory: torch.Tensor,
    proxy_clusters: torch.Tensor,
    proxy_cameras: torch.Tensor,
    logits: torch.Tensor,
    stats: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """The gradient to ``x`` in its dtype, given ``grad``, that of the loss. One launch, or two without a list."""
    (b, d), n, s = x.shape, len(memory), settings
    grad_x = torch.empty(b, d, dtype=x.dtype, device=x.device)
    if b == 0:
        return grad_x
    x, memory = as_rows(x), as_rows(memory)
    ids = [each.contiguous() for each in (clusters, cameras, proxy_clusters, proxy_cameras)]
    scale, stride_g = 1 / s.temperature, grad.stride(0) if grad.ndim else 0
    strides = logits.stride(0), memory.stride(0), x.stride(0), stride_g
    with torch.cuda.device_of(x):
        if chosen.shape[1] > 0:
            at_a_time, block, block_d, warps = GATHER_TILE
            block_d = min(block_d, triton.next_power_of_2(d))
            _proxy_nce_gather_kernel[(b, triton.cdiv(d, block_d))](
                logits, memory, x, stats, chosen, counts, *ids, grad, grad_x,
                *strides, b, n, d, chosen.shape[1], scale,
                NORMALIZE=s.normalize, POSITIVES=s.positives, ROWS=at_a_time, BLOCK=block, BLOCK_D=block_d,
                num_warps=warps,
            )  # fmt: skip
            return grad_x
        block_b, block_q, block_d, warps = BACKWARD_TILE[number_bytes(x, memory)]
        grid = triton.cdiv(b, block_b), triton.cdiv(d, block_d)
        splits = min(triton.cdiv(96, grid[0] * grid[1]), triton.cdiv(n, 8 * block_q))
        tiles = triton.cdiv(triton.cdiv(n, block_q), splits)
        partial = x if splits == 1 else torch.empty(splits, b, d, dtype=torch.float32, device=x.device)
        _proxy_nce_grad_x_kernel[(*grid, splits)](
            logits, memory, x, stats, *ids, grad, partial, grad_x, *strides, b, n, d, scale, tiles,
            NORMALIZE=s.normalize, SCOPE=s.scope, POSITIVES=s.positives, FINISH=splits == 1,
            PRECISION=PRECISIONS[s.precision], BLOCK_B=block_b, BLOCK_Q=block_q, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _proxy_nce_finish_kernel[(triton.cdiv(b, 8), grid[1])](
                partial, x, stats, grad, grad_x, x.stride(0), stride_g, b, d, scale, splits,
                NORMALIZE=s.normalize, BLOCK_B=8, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
    return grad_x

# SPDX-License-Identifier: Apache-2.0
"""The backward: gradients to the features and to the memory."""

import torch
import triton
import triton.language as tl

from .layout import (
    EPS,
    INV_NORM,
    LSE,
    OF_EXTRA,
    OF_ONE,
    OF_P,
    OF_TARGET,
    OF_TEACHER,
    SLOPE,
    TEACHER_LSE,
    as_rows,
    number_bytes,
)
from .logits import forward_tile, launch_logits
from .settings import PRECISIONS, Settings

LEAN_BYTES = 16 * 2**20  # one block of the logits that a lean backward makes again
# samples, classes, columns of a tile, warps; literals, because autotuning would make bits depend on timing
# and by bytes of a number, the largest that keep within the registers of sm_80, sm_90 and sm_100
BACKWARD_TILE = {4: (64, 32, 64, 8), 2: (64, 16, 64, 8)}
# the same with a teacher or an extra target: more numbers to keep for each pair of a sample and a class
DENSE_BACKWARD_TILE = {4: (64, 16, 64, 8), 2: (64, 16, 64, 8)}


@triton.jit
def _logit_gradient(
    logits_ptr, extra_ptr, stats_ptr, target, b, c, live_b, live, logit_offset, teacher_offset, extra_offset, B,
    TEACHER: tl.constexpr, UNIFORM: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of a tile, samples ``b`` and classes ``c`` along either axis; 0 at masked classes."""
    lse = tl.load(stats_ptr + LSE * B + b, mask=live_b, other=0.0)
    of_p = tl.load(stats_ptr + OF_P * B + b, mask=live_b, other=0.0)
    of_target = tl.load(stats_ptr + OF_TARGET * B + b, mask=live_b, other=0.0)
    logits = tl.load(logits_ptr + logit_offset, mask=live, other=float("-inf"))
    gradient = of_p * tl.exp(logits - lse) - tl.where(c == target, of_target, 0.0)
    if TEACHER:
        teacher_lse = tl.load(stats_ptr + TEACHER_LSE * B + b, mask=live_b, other=0.0)
        of_teacher = tl.load(stats_ptr + OF_TEACHER * B + b, mask=live_b, other=0.0)
        teacher_logits = tl.load(logits_ptr + teacher_offset, mask=live, other=float("-inf"))
        gradient -= of_teacher * tl.exp(teacher_logits - teacher_lse)
    if UNIFORM:
        of_one = tl.load(stats_ptr + OF_ONE * B + b, mask=live_b, other=0.0)
        gradient -= tl.where(logits == float("-inf"), 0.0, of_one)
    if EXTRA:
        of_extra = tl.load(stats_ptr + OF_EXTRA * B + b, mask=live_b, other=0.0)
        extra = tl.load(extra_ptr + extra_offset, mask=live, other=0.0).to(tl.float32)
        gradient -= tl.where(logits == float("-inf"), 0.0, of_extra * extra)
    return gradient


@triton.jit
def _through_the_norm(
    acc, b, d, x_ptr, stats_ptr, targets_ptr, grad_ptr, grad_x_ptr, stride_x, stride_g, B, D, scale, ignore_index,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Store d loss / d x for samples ``b`` and columns ``d``, given ``acc = (d loss / d logits) @ memory``."""
    live_b = b < B
    live = live_b[:, None] & (d < D)[None, :]
    kept = live_b & (tl.load(targets_ptr + b, mask=live_b, other=0) != ignore_index)
    factor = tl.load(grad_ptr + b.to(tl.int64) * stride_g, mask=live_b, other=0.0).to(tl.float32)
    grad = acc * scale
    if NORMALIZE:
        inv_norm = tl.load(stats_ptr + INV_NORM * B + b, mask=live_b, other=0.0)
        slope = tl.load(stats_ptr + SLOPE * B + b, mask=live_b, other=0.0)
        slope = tl.where(inv_norm < 1.0 / EPS, slope, 0.0)  # a row of (nearly) zero length was not normalised
        x = tl.load(x_ptr + b.to(tl.int64)[:, None] * stride_x + d[None, :], mask=live, other=0.0).to(tl.float32)
        grad -= x * (inv_norm * slope)[:, None]
        factor *= inv_norm
    grad = tl.where(kept[:, None], grad * factor[:, None], 0.0)
    tl.store(grad_x_ptr + b.to(tl.int64)[:, None] * D + d[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["B", "first", "last", "tiles", "stride_g", "ignore_index"])
def _cluster_nce_grad_x_kernel(
    logits_ptr,  # [B, last - first] fp32, [2 B, ...] if TEACHER
    memory_ptr,  # [C, D] any float
    x_ptr,  # [B, D] any float
    extra_ptr,  # [B, C] any float, read if EXTRA
    stats_ptr,  # [STATS, B] fp32
    targets_ptr,  # [B] int
    grad_ptr,  # [] or [B] float, stride_g apart
    partial_ptr,  # [splits, B, D] fp32, written unless FINISH
    grad_x_ptr,  # [B, D], written if FINISH
    stride_l, stride_m, stride_x, stride_e, stride_g,
    B, first, last, D, scale, tiles, ignore_index,
    NORMALIZE: tl.constexpr, TEACHER: tl.constexpr, UNIFORM: tl.constexpr, EXTRA: tl.constexpr,
    FINISH: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    live_b = b < B
    target = tl.load(targets_ptr + b, mask=live_b, other=-1)
    first_b = (tl.program_id(0) * BLOCK_B).to(tl.int64)
    logits_ptr += first_b * stride_l
    extra_ptr += first_b * stride_e
    wide_l = tl.cast(stride_l, tl.int64)
    row = tl.arange(0, BLOCK_B)[:, None]
    wide_m = tl.cast(stride_m, tl.int64)
    m_offset = tl.arange(0, BLOCK_C)[:, None] * stride_m + d[None, :]
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    begin = first + split * tiles * BLOCK_C
    for start in range(begin, tl.minimum(begin + tiles * BLOCK_C, last), BLOCK_C):
        column = tl.arange(0, BLOCK_C)[None, :]
        live_c = start + tl.arange(0, BLOCK_C) < last
        g = _logit_gradient(
            logits_ptr + (start - first), extra_ptr + start, stats_ptr, target[:, None], b[:, None], start + column,
            live_b[:, None], live_b[:, None] & live_c[None, :],
            row * stride_l + column, B * wide_l + row * stride_l + column, row * stride_e + column, B,
            TEACHER, UNIFORM, EXTRA,
        )  # fmt: skip
        rows = memory_ptr + start * wide_m + m_offset
        m = tl.load(rows, mask=live_c[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(g, m, acc, input_precision=PRECISION)
    if FINISH:
        _through_the_norm(
            acc, b, d, x_ptr, stats_ptr, targets_ptr, grad_ptr, grad_x_ptr, stride_x, stride_g, B, D, scale,
            ignore_index, NORMALIZE,
        )  # fmt: skip
    else:
        out = partial_ptr + (split * B + b)[:, None] * tl.cast(D, tl.int64) + d[None, :]
        live = live_b[:, None] & (d < D)[None, :]
        if ADD:
            acc += tl.load(out, mask=live, other=0.0)
        tl.store(out, acc, mask=live)


@triton.jit(do_not_specialize=["B", "splits", "stride_g", "ignore_index"])
def _cluster_nce_finish_kernel(
    partial_ptr,  # [splits, B, D] fp32
    x_ptr, stats_ptr, targets_ptr, grad_ptr, grad_x_ptr,
    stride_x, stride_g, B, D, scale, ignore_index, splits,
    NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (b < B)[:, None] & (d < D)[None, :]
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + (split * B + b)[:, None] * tl.cast(D, tl.int64) + d[None, :], mask=live, other=0.0)
    _through_the_norm(
        acc, b, d, x_ptr, stats_ptr, targets_ptr, grad_ptr, grad_x_ptr, stride_x, stride_g, B, D, scale,
        ignore_index, NORMALIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "first", "last", "stride_g", "ignore_index"])
def _cluster_nce_grad_memory_kernel(
    logits_ptr,  # [B, last - first] fp32, [2 B, ...] if TEACHER
    x_ptr,  # [B, D] any float
    extra_ptr,  # [B, C] any float, read if EXTRA
    stats_ptr,  # [STATS, B] fp32
    targets_ptr,  # [B] int
    grad_ptr,  # [] or [B] float, stride_g apart
    grad_memory_ptr,  # [C, D], rows first .. last - 1 written
    stride_l, stride_x, stride_e, stride_g,
    B, first, last, D, scale, ignore_index,
    TEACHER: tl.constexpr, UNIFORM: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    c = first + tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live_b = b < B
        wide_b = b.to(tl.int64)[None, :]
        target = tl.load(targets_ptr + b, mask=live_b, other=-1)
        factor = tl.load(stats_ptr + INV_NORM * B + b, mask=live_b, other=0.0)
        factor *= tl.load(grad_ptr + b.to(tl.int64) * stride_g, mask=live_b, other=0.0).to(tl.float32) * scale
        kept = live_b & (target != ignore_index)
        logit_offset = wide_b * stride_l + (c - first)[:, None]
        g = _logit_gradient(
            logits_ptr, extra_ptr, stats_ptr, target[None, :], b[None, :], c[:, None],
            live_b[None, :], live_b[None, :] & (c < last)[:, None],
            logit_offset, B * tl.cast(stride_l, tl.int64) + logit_offset, wide_b * stride_e + c[:, None], B,
            TEACHER, UNIFORM, EXTRA,
        )  # fmt: skip
        g = tl.where(kept[None, :], g * factor[None, :], 0.0)
        columns = x_ptr + b.to(tl.int64)[:, None] * stride_x + d[None, :]
        x = tl.load(columns, mask=kept[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(g, x.to(tl.float32), acc, input_precision=PRECISION)
    out = grad_memory_ptr + c.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, acc.to(grad_memory_ptr.dtype.element_ty), mask=(c < last)[:, None] & (d < D)[None, :])


def cluster_nce_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    stats: torch.Tensor,
    logits: torch.Tensor,
    settings: Settings,
    *,
    need_x: bool = True,
    need_memory: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients to ``x`` and ``memory`` in their own dtypes, None where not needed; ``grad`` is that of the loss.

    One launch for ``x``, two where the classes are split too, one more for ``memory``; lean, so for each block of them.
    """
    (b, d), c = x.shape, len(memory)
    grad_x = torch.empty(b, d, dtype=x.dtype, device=x.device) if need_x else None
    grad_memory = torch.empty(c, d, dtype=memory.dtype, device=x.device) if need_memory else None
    if b == 0:
        return grad_x, grad_memory.zero_() if need_memory else None
    x, memory, targets, settings = as_rows(x), as_rows(memory), targets.contiguous(), settings.laid_out()
    extra = x if settings.extra_target is None else settings.extra_target
    scale, stride_g = 1 / settings.temperature, grad.stride(0) if grad.ndim else 0
    tile = DENSE_BACKWARD_TILE if settings.is_dense else BACKWARD_TILE
    block_b, block_c, block_d, warps = tile[number_bytes(x, memory)]
    grid = triton.cdiv(b, block_b), triton.cdiv(d, block_d)

    lean = logits.shape[1] < c
    width = c
    if lean:
        width = _lean_width(len(logits), x, memory, settings)
        logits = torch.empty(len(logits), width, dtype=torch.float32, device=x.device)
    splits = min(triton.cdiv(96, grid[0] * grid[1]), triton.cdiv(width, 8 * block_c))
    tiles = triton.cdiv(triton.cdiv(width, block_c), splits)
    finish = splits == 1 and not lean
    partial = x if finish or not need_x else torch.empty(splits, b, d, dtype=torch.float32, device=x.device)
    both = settings.soft | {"PRECISION": PRECISIONS[settings.precision], "BLOCK_D": block_d, "num_warps": warps}
    with torch.cuda.device_of(x):
        for first in range(0, c, width):
            last = min(first + width, c)
            if lean:
                launch_logits(x, targets, memory, logits, stats, settings, first=first, last=last)
            if need_x:
                _cluster_nce_grad_x_kernel[(*grid, splits)](
                    logits, memory, x, extra, stats, targets, grad, partial, grad_x,
                    logits.stride(0), memory.stride(0), x.stride(0), extra.stride(0), stride_g,
                    b, first, last, d, scale, tiles, settings.ignore_index,
                    NORMALIZE=settings.normalize, FINISH=finish, ADD=first > 0,
                    BLOCK_B=block_b, BLOCK_C=block_c, **both,
                )  # fmt: skip
            if need_memory:
                _cluster_nce_grad_memory_kernel[(triton.cdiv(last - first, block_b), grid[1])](
                    logits, x, extra, stats, targets, grad, grad_memory,
                    logits.stride(0), x.stride(0), extra.stride(0), stride_g,
                    b, first, last, d, scale, settings.ignore_index, BLOCK_B=block_c, BLOCK_C=block_b, **both,
                )  # fmt: skip
        if need_x and not finish:
            _cluster_nce_finish_kernel[(triton.cdiv(b, 8), grid[1])](
                partial, x, stats, targets, grad, grad_x, x.stride(0), stride_g,
                b, d, scale, settings.ignore_index, splits,
                NORMALIZE=settings.normalize, BLOCK_B=8, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
    return grad_x, grad_memory


def _lean_width(rows_of_logits: int, x: torch.Tensor, memory: torch.Tensor, settings: Settings) -> int:
    """Classes of one block: as many tiles as fit ``LEAN_BYTES`` and the second axis of a grid, at least one."""
    _, tile_c, _, _ = forward_tile(x, memory, settings)
    return min(len(memory), max(1, min(LEAN_BYTES // (4 * rows_of_logits) // tile_c, 65_535)) * tile_c)

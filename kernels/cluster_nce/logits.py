# SPDX-License-Identifier: Apache-2.0
"""Similarities of a tile of samples and a tile of classes, and their sums over the classes that one program takes."""

import torch
import triton
import triton.language as tl

from .layout import (
    CLASSES,
    EPS,
    EXTRA_LOGITS,
    EXTRA_SUM,
    INV_NORM,
    LOGIT_SUM,
    P_SUMS,
    SUMS,
    TEACHER_SUMS,
    number_bytes,
)
from .settings import PRECISIONS, Settings

# samples, classes, columns of a tile, warps; literals, because autotuning would make bits depend on timing
# and by bytes of a number, the largest that keep within the registers of sm_80, sm_90 and sm_100
FORWARD_TILE = {4: (64, 64, 32, 8), 2: (64, 64, 64, 8)}
# the same with a teacher or an extra target: more numbers to keep for each pair of a sample and a class
DENSE_FORWARD_TILE = {4: (32, 64, 32, 8), 2: (32, 64, 64, 8)}


@triton.jit
def _add_exponentials(logits, values, live, highest, total, weighted):
    """Take a tile into running sums of exp(logits) and exp(logits) values, both over exp(highest)."""
    new_highest = tl.maximum(highest, tl.max(tl.where(live, logits, float("-inf")), axis=1))
    pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # no class so far: they may all be masked
    e = tl.where(live, tl.exp(logits - pivot[:, None]), 0.0)
    rescale = tl.exp(highest - pivot)
    total = total * rescale + tl.sum(e, axis=1)
    weighted = weighted * rescale + tl.sum(e * tl.where(live, values, 0.0), axis=1)
    return new_highest, total, weighted


@triton.jit
def _store_sums(out, highest, total, weighted, live, stride):
    tl.store(out, highest, mask=live)
    tl.store(out + stride, total, mask=live)
    tl.store(out + 2 * stride, weighted, mask=live)


@triton.jit(do_not_specialize=["B", "first", "last", "tiles"])
def _cluster_nce_logits_kernel(
    x_ptr,  # [B, D] any float
    memory_ptr,  # [C, D] any float
    targets_ptr,  # [B] int
    teacher_ptr,  # [B, D] any float, read if TEACHER
    extra_ptr,  # [B, C] any float, read if EXTRA
    mask_ptr,  # [C] bool, read if MASKED
    logits_ptr,  # [B, last - first] fp32, [2 B, ...] if TEACHER; written if STORE, -inf where masked
    partial_ptr,  # fp32, written if SUM: [SUMS, B, splits], [B]
    stats_ptr,  # [STATS, B] fp32, INV_NORM written if SUM
    stride_x, stride_m, stride_t, stride_e, stride_l,
    B, first, last, D,  # this launch covers the classes first .. last - 1
    scale, teacher_scale,  # 1 / temperature
    tiles,  # tiles of BLOCK_C classes that one program takes
    NORMALIZE: tl.constexpr, STORE: tl.constexpr, SUM: tl.constexpr, TEACHER: tl.constexpr, UNIFORM: tl.constexpr,
    EXTRA: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take other samples and the same classes: a tile of the memory comes from DRAM once.
    split = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live_b = b < B
    # Scalar 64-bit bases and 32-bit offsets within a tile: tiles of 64-bit pointers would spill.
    first_b = (tl.program_id(0) * BLOCK_B).to(tl.int64)
    x_ptr += first_b * stride_x
    teacher_ptr += first_b * stride_t
    d = tl.arange(0, BLOCK_D)
    row = tl.arange(0, BLOCK_B)[:, None]
    wide_m = tl.cast(stride_m, tl.int64)
    m_offset = tl.arange(0, BLOCK_C)[None, :] * stride_m + d[:, None]
    target = tl.load(targets_ptr + b, mask=live_b, other=-1)
    highest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    weighted = tl.zeros([BLOCK_B], tl.float32)
    target_logit = tl.zeros([BLOCK_B], tl.float32)
    inv_norm = tl.full([BLOCK_B], 1.0, tl.float32)
    t_inv_norm = tl.full([BLOCK_B], 1.0, tl.float32)
    t_highest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    t_total = tl.zeros([BLOCK_B], tl.float32)
    t_weighted = tl.zeros([BLOCK_B], tl.float32)
    classes = 0.0
    logit_sum = tl.zeros([BLOCK_B], tl.float32)
    extra_sum = tl.zeros([BLOCK_B], tl.float32)
    extra_logits = tl.zeros([BLOCK_B], tl.float32)

    begin = first + split * tiles * BLOCK_C
    end = tl.minimum(begin + tiles * BLOCK_C, last)
    for start in range(begin, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_range = c < last
        m_ptr = memory_ptr + start * wide_m
        acc = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        t_acc = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        t_squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for k in range(0, D, BLOCK_D):
            live_d = d < D - k
            x = tl.load(x_ptr + k + row * stride_x + d[None, :], mask=live_b[:, None] & live_d[None, :], other=0.0)
            m = tl.load(m_ptr + k + m_offset, mask=live_d[:, None] & in_range[None, :], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                m = m.to(tl.float32)
            if NORMALIZE:
                squares += x.to(tl.float32) * x.to(tl.float32)
            acc = tl.dot(x, m, acc, input_precision=PRECISION)
            if TEACHER:
                rows = teacher_ptr + k + row * stride_t + d[None, :]
                t = tl.load(rows, mask=live_b[:, None] & live_d[None, :], other=0.0)
                if UPCAST:
                    t = t.to(tl.float32)
                if NORMALIZE:
                    t_squares += t.to(tl.float32) * t.to(tl.float32)
                t_acc = tl.dot(t, m, t_acc, input_precision=PRECISION)
        live_c = in_range
        if MASKED:
            live_c = in_range & (tl.load(mask_ptr + c, mask=in_range, other=0) != 0)
        live = live_c[None, :]
        if NORMALIZE:
            inv_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), EPS)
        logits = tl.where(live, acc * (inv_norm * scale)[:, None], float("-inf"))
        tile = logits_ptr + b.to(tl.int64)[:, None] * stride_l + (c - first)[None, :]
        if STORE:
            tl.store(tile, logits, mask=live_b[:, None] & in_range[None, :])
        if SUM:
            highest, total, weighted = _add_exponentials(logits, logits, live, highest, total, weighted)
            target_logit += tl.sum(tl.where(c[None, :] == target[:, None], logits, 0.0), axis=1)
        if TEACHER:
            if NORMALIZE:
                t_inv_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(t_squares, axis=1)), EPS)
            t_logits = tl.where(live, t_acc * (t_inv_norm * teacher_scale)[:, None], float("-inf"))
            if STORE:
                tl.store(tile + B * tl.cast(stride_l, tl.int64), t_logits, mask=live_b[:, None] & in_range[None, :])
            if SUM:
                t_highest, t_total, t_weighted = _add_exponentials(
                    t_logits, logits, live, t_highest, t_total, t_weighted
                )
        if UNIFORM:
            classes += tl.sum(live_c.to(tl.float32))
            logit_sum += tl.sum(tl.where(live, logits, 0.0), axis=1)
        if EXTRA:
            e_tile = extra_ptr + b.to(tl.int64)[:, None] * stride_e + c[None, :]
            extra = tl.load(e_tile, mask=live_b[:, None] & live, other=0.0).to(tl.float32)
            extra_sum += tl.sum(extra, axis=1)
            extra_logits += tl.sum(extra * tl.where(live, logits, 0.0), axis=1)

    if SUM:
        stride = B * tl.num_programs(1)
        out = partial_ptr + b * tl.num_programs(1) + split
        _store_sums(out + P_SUMS * stride, highest, total, weighted, live_b, stride)
        if TEACHER:
            _store_sums(out + TEACHER_SUMS * stride, t_highest, t_total, t_weighted, live_b, stride)
        if UNIFORM:
            tl.store(out + CLASSES * stride, tl.zeros([BLOCK_B], tl.float32) + classes, mask=live_b)
            tl.store(out + LOGIT_SUM * stride, logit_sum, mask=live_b)
        if EXTRA:
            tl.store(out + EXTRA_SUM * stride, extra_sum, mask=live_b)
            tl.store(out + EXTRA_LOGITS * stride, extra_logits, mask=live_b)
        here = (target >= begin) & (target < end) & live_b
        tl.store(partial_ptr + SUMS * stride + b, target_logit, mask=here)
        if split == 0:
            tl.store(stats_ptr + INV_NORM * B + b, inv_norm, mask=live_b)


def forward_tile(x: torch.Tensor, memory: torch.Tensor, settings: Settings) -> tuple[int, int, int, int]:
    """Samples, classes and columns of a tile, and warps."""
    return (DENSE_FORWARD_TILE if settings.is_dense else FORWARD_TILE)[number_bytes(x, memory)]


def launch_logits(
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    logits: torch.Tensor,
    stats: torch.Tensor,
    settings: Settings,
    *,
    first: int,
    last: int,
    partial: torch.Tensor | None = None,
    tiles: int = 1,
) -> None:
    """Logits of the classes ``first .. last - 1``, and with ``partial`` their sums; one launch.

    Args:
        x, targets, memory, settings: as in ``cluster_nce``, laid out.
        logits: (B, last - first) float32, with a teacher its own below; written unless it has no columns.
        stats: (STATS, B) float32; with ``partial`` INV_NORM is written.
        partial: (SUMS splits + 1, B) float32, written.
        tiles: of classes that one program takes: ``splits = cdiv(last - first, tiles BLOCK_C)`` programs share them.
    """
    b, d = x.shape
    block_b, block_c, block_d, warps = forward_tile(x, memory, settings)
    teacher = x if settings.teacher is None else settings.teacher
    extra = x if settings.extra_target is None else settings.extra_target
    mask = targets if settings.class_mask is None else settings.class_mask
    is_summed = partial is not None
    soft = settings.soft if is_summed else settings.soft | {"UNIFORM": False, "EXTRA": False}
    _cluster_nce_logits_kernel[(triton.cdiv(b, block_b), triton.cdiv(last - first, tiles * block_c))](
        x, memory, targets, teacher, extra, mask, logits, partial if is_summed else logits, stats,
        x.stride(0), memory.stride(0), teacher.stride(0), extra.stride(0) if is_summed else 0, logits.stride(0),
        b, first, last, d,
        1 / settings.temperature, 1 / (settings.teacher_temperature or settings.temperature), tiles,
        NORMALIZE=settings.normalize, STORE=logits.shape[1] > 0, SUM=is_summed, **soft,
        MASKED=settings.class_mask is not None, UPCAST=_upcast(x, memory, teacher),
        PRECISION=PRECISIONS[settings.precision],
        BLOCK_B=block_b, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip


def _upcast(x: torch.Tensor, memory: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Other dtypes meet in float32; so does bfloat16 on a CPU, where Triton's interpreter multiplies it wrongly."""
    return len({x.dtype, memory.dtype, teacher.dtype}) > 1 or (x.dtype == torch.bfloat16 and x.device.type == "cpu")

# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against a memory of prototypes, forward and backward (Triton).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Method: Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, equation 1.
Oracle: fastreid_u/reference/cluster_nce.py.  Cost: 4 B C D multiply-adds forward and backward, memory read twice.

With l = l2(x) @ memory.T / T, p = softmax(l) and y the target, the loss of a sample is lse(l) - l_y and

    d loss / d x = (((p - onehot_y) @ memory) / T - x̂ slope) / |x|,    slope = sum_c p_c l_c - l_y,    x̂ = x / |x|

The slope is the part of the gradient along x̂, which the normalisation removes. It comes out of the forward's sums, so
the backward needs no pass over a finished gradient. Small batches store their logits once and take three launches in
all; past ``STORED_BYTES`` the backward makes them again, a block of classes at a time ("lean").

Nothing is accumulated by atomics and no tile depends on the device: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

STORED_BYTES = 64 * 2**20  # logits up to this size are kept for the backward
LEAN_BYTES = 16 * 2**20  # one block of the logits that a lean backward makes again
MAX_SPLITS = 128  # programs that share the classes of one block of samples
BAD_TARGET = 1  # bit of `status`, as in momentum_update.py
EPS = tl.constexpr(1e-12)  # smallest length that divides, as in torch.nn.functional.normalize
# rows of `stats`, (4, B) float32: what the forward leaves for the backward
LSE, SLOPE, INV_NORM, COEFFICIENT = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=["B", "first", "last", "tiles"])
def _cluster_nce_logits_kernel(
    x_ptr,  # [B, D] any float
    memory_ptr,  # [C, D] any float
    targets_ptr,  # [B] int
    logits_ptr,  # [B, last - first] fp32, written if STORE
    partial_ptr,  # fp32, written if SUM: [3, B, splits] maximum, sum of exp, sum of exp times logit; [B] target's logit
    stats_ptr,  # [4, B] fp32, INV_NORM written if SUM
    stride_x, stride_m, stride_l,
    B, first, last, D,  # this launch covers the classes first .. last - 1
    scale,  # 1 / temperature
    tiles,  # tiles of BLOCK_C classes that one program takes
    NORMALIZE: tl.constexpr, STORE: tl.constexpr, SUM: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take other samples and the same classes: a tile of the memory comes from DRAM once.
    split = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live_b = b < B
    # Scalar 64-bit bases and 32-bit offsets within a tile: tiles of 64-bit pointers would spill.
    x_ptr += (tl.program_id(0) * BLOCK_B).to(tl.int64) * stride_x
    d = tl.arange(0, BLOCK_D)
    x_offset = tl.arange(0, BLOCK_B)[:, None] * stride_x + d[None, :]
    wide_m = tl.cast(stride_m, tl.int64)
    m_offset = tl.arange(0, BLOCK_C)[None, :] * stride_m + d[:, None]
    target = tl.load(targets_ptr + b, mask=live_b, other=-1)
    highest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    weighted = tl.zeros([BLOCK_B], tl.float32)
    target_logit = tl.zeros([BLOCK_B], tl.float32)
    inv_norm = tl.full([BLOCK_B], 1.0, tl.float32)

    begin = first + split * tiles * BLOCK_C
    end = tl.minimum(begin + tiles * BLOCK_C, last)
    for start in range(begin, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        live_c = c < last
        m_ptr = memory_ptr + start * wide_m
        acc = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for k in range(0, D, BLOCK_D):
            live_d = d < D - k
            x = tl.load(x_ptr + k + x_offset, mask=live_b[:, None] & live_d[None, :], other=0.0)
            m = tl.load(m_ptr + k + m_offset, mask=live_d[:, None] & live_c[None, :], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                m = m.to(tl.float32)
            if NORMALIZE:
                squares += x.to(tl.float32) * x.to(tl.float32)
            acc = tl.dot(x, m, acc, input_precision=PRECISION)
        if NORMALIZE:
            inv_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), EPS)
        logits = acc * (inv_norm * scale)[:, None]
        if STORE:
            tile = logits_ptr + b.to(tl.int64)[:, None] * stride_l + (c - first)[None, :]
            tl.store(tile, logits, mask=live_b[:, None] & live_c[None, :])
        if SUM:
            new_highest = tl.maximum(highest, tl.max(tl.where(live_c[None, :], logits, float("-inf")), axis=1))
            e = tl.where(live_c[None, :], tl.exp(logits - new_highest[:, None]), 0.0)
            rescale = tl.exp(highest - new_highest)
            total = total * rescale + tl.sum(e, axis=1)
            weighted = weighted * rescale + tl.sum(e * logits, axis=1)
            target_logit += tl.sum(tl.where(c[None, :] == target[:, None], logits, 0.0), axis=1)
            highest = new_highest

    if SUM:
        splits = tl.num_programs(1)
        out = partial_ptr + b * splits + split
        tl.store(out, highest, mask=live_b)
        tl.store(out + B * splits, total, mask=live_b)
        tl.store(out + 2 * B * splits, weighted, mask=live_b)
        here = (target >= begin) & (target < end) & live_b
        tl.store(partial_ptr + 3 * B * splits + b, target_logit, mask=here)
        if split == 0:
            tl.store(stats_ptr + INV_NORM * B + b, inv_norm, mask=live_b)


@triton.jit(do_not_specialize=["B", "C", "splits", "ignore_index"])
def _cluster_nce_loss_kernel(
    partial_ptr,  # fp32: [3, B, splits], [B]
    stats_ptr,  # [4, B] fp32, LSE, SLOPE and COEFFICIENT written
    targets_ptr,  # [B] int
    weight_ptr,  # [B] any float, read if WEIGHTED
    loss_ptr,  # [] or [B] fp32
    status_ptr,  # [1] int32, written if HAS_STATUS
    B, C, splits, ignore_index,
    WEIGHTED: tl.constexpr, REDUCTION: tl.constexpr, HAS_STATUS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # One program: the sum over the batch has one order, and the batch is small.
    kept_count = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        target = tl.load(targets_ptr + b, mask=b < B, other=0)
        kept_count += ((target != ignore_index) & (b < B)).to(tl.float32)
    divisor = 1.0
    if REDUCTION == "mean":
        divisor = tl.maximum(tl.sum(kept_count), 1.0)

    s = tl.arange(0, BLOCK_S)
    loss_sum = tl.zeros([BLOCK_B], tl.float32)
    wrong = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live_b = b < B
        tile = partial_ptr + b[:, None] * splits + s[None, :]
        live = live_b[:, None] & (s < splits)[None, :]
        highest = tl.load(tile, mask=live, other=float("-inf"))
        total = tl.load(tile + B * splits, mask=live, other=0.0)
        weighted = tl.load(tile + 2 * B * splits, mask=live, other=0.0)
        top = tl.where(live_b, tl.max(highest, axis=1), 0.0)
        rescale = tl.where(live, tl.exp(highest - top[:, None]), 0.0)
        total = tl.where(live_b, tl.sum(total * rescale, axis=1), 1.0)
        lse = top + tl.log(total)

        target = tl.load(targets_ptr + b, mask=live_b, other=0)
        kept = live_b & (target != ignore_index)
        legal = (target >= 0) & (target < C)
        wrong = tl.maximum(wrong, (kept & (legal == 0)).to(tl.int32))
        target_logit = tl.load(partial_ptr + 3 * B * splits + b, mask=kept & legal, other=float("nan"))
        slope = tl.sum(weighted * rescale, axis=1) / total - target_logit
        weight = tl.full([BLOCK_B], 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + b, mask=live_b, other=0.0).to(tl.float32)
        coefficient = weight / divisor
        loss = tl.where(kept, (lse - target_logit) * weight, 0.0)
        loss_sum += loss
        tl.store(stats_ptr + LSE * B + b, lse, mask=live_b)
        tl.store(stats_ptr + SLOPE * B + b, tl.where(kept, slope, 0.0), mask=live_b)
        tl.store(stats_ptr + COEFFICIENT * B + b, tl.where(kept, coefficient, 0.0), mask=live_b)
        if REDUCTION == "none":
            tl.store(loss_ptr + b, loss, mask=live_b)
    if REDUCTION != "none":
        tl.store(loss_ptr, tl.sum(loss_sum) / divisor)
    if HAS_STATUS:  # noqa: SIM102 - this one is decided by the compiler
        if tl.max(wrong) != 0:
            tl.atomic_or(status_ptr, 1)


@triton.jit
def _through_the_norm(
    acc, b, d, x_ptr, stats_ptr, targets_ptr, grad_ptr, grad_x_ptr, stride_x, stride_g, B, D, scale, ignore_index,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Store d loss / d x for samples ``b`` and columns ``d``, given ``acc = (p - onehot) @ memory``."""
    live_b = b < B
    live = live_b[:, None] & (d < D)[None, :]
    kept = live_b & (tl.load(targets_ptr + b, mask=live_b, other=0) != ignore_index)
    factor = tl.load(stats_ptr + COEFFICIENT * B + b, mask=live_b, other=0.0)
    factor *= tl.load(grad_ptr + b.to(tl.int64) * stride_g, mask=live_b, other=0.0).to(tl.float32)
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
    logits_ptr,  # [B, last - first] fp32
    memory_ptr,  # [C, D] any float
    x_ptr,  # [B, D] any float
    stats_ptr,  # [4, B] fp32
    targets_ptr,  # [B] int
    grad_ptr,  # [] or [B] float, stride_g apart
    partial_ptr,  # [splits, B, D] fp32, written unless FINISH
    grad_x_ptr,  # [B, D], written if FINISH
    stride_l, stride_m, stride_x, stride_g,
    B, first, last, D, scale, tiles, ignore_index,
    NORMALIZE: tl.constexpr, FINISH: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    live_b = b < B
    target = tl.load(targets_ptr + b, mask=live_b, other=-1)
    lse = tl.load(stats_ptr + LSE * B + b, mask=live_b, other=0.0)
    logits_ptr += (tl.program_id(0) * BLOCK_B).to(tl.int64) * stride_l
    l_offset = tl.arange(0, BLOCK_B)[:, None] * stride_l + tl.arange(0, BLOCK_C)[None, :]
    wide_m = tl.cast(stride_m, tl.int64)
    m_offset = tl.arange(0, BLOCK_C)[:, None] * stride_m + d[None, :]
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    begin = first + split * tiles * BLOCK_C
    for start in range(begin, tl.minimum(begin + tiles * BLOCK_C, last), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        live_c = c < last
        logits = tl.load(
            logits_ptr + (start - first) + l_offset, mask=live_b[:, None] & live_c[None, :], other=float("-inf")
        )
        p = tl.exp(logits - lse[:, None]) - (c[None, :] == target[:, None]).to(tl.float32)
        rows = memory_ptr + start * wide_m + m_offset
        m = tl.load(rows, mask=live_c[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(p, m, acc, input_precision=PRECISION)
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
    logits_ptr,  # [B, last - first] fp32
    x_ptr,  # [B, D] any float
    stats_ptr,  # [4, B] fp32
    targets_ptr,  # [B] int
    grad_ptr,  # [] or [B] float, stride_g apart
    grad_memory_ptr,  # [C, D], rows first .. last - 1 written
    stride_l, stride_x, stride_g,
    B, first, last, D, scale, ignore_index,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    c = first + tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live_b = b < B
        target = tl.load(targets_ptr + b, mask=live_b, other=-1)
        lse = tl.load(stats_ptr + LSE * B + b, mask=live_b, other=0.0)
        factor = tl.load(stats_ptr + COEFFICIENT * B + b, mask=live_b, other=0.0)
        factor *= tl.load(stats_ptr + INV_NORM * B + b, mask=live_b, other=0.0)
        factor *= tl.load(grad_ptr + b.to(tl.int64) * stride_g, mask=live_b, other=0.0).to(tl.float32) * scale
        kept = live_b & (target != ignore_index)
        tile = logits_ptr + b.to(tl.int64)[None, :] * stride_l + (c - first)[:, None]
        logits = tl.load(tile, mask=(c < last)[:, None] & live_b[None, :], other=float("-inf"))
        p = tl.exp(logits - lse[None, :]) - (c[:, None] == target[None, :]).to(tl.float32)
        p = tl.where(kept[None, :], p * factor[None, :], 0.0)
        columns = x_ptr + b.to(tl.int64)[:, None] * stride_x + d[None, :]
        x = tl.load(columns, mask=kept[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(p, x.to(tl.float32), acc, input_precision=PRECISION)
    out = grad_memory_ptr + c.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, acc.to(grad_memory_ptr.dtype.element_ty), mask=(c < last)[:, None] & (d < D)[None, :])


# samples, classes, columns of a tile, warps; literals, because autotuning would make bits depend on timing
# and by bytes of a number, the largest that keep within the registers of sm_80, sm_90 and sm_100
FORWARD_TILE = {4: (64, 64, 32, 8), 2: (64, 64, 64, 8)}
BACKWARD_TILE = {4: (64, 32, 64, 8), 2: (64, 16, 64, 8)}
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32"}  # tf32x3: three products of rounded halves, as accurate as float32


def cluster_nce_fwd(
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    weight: torch.Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    precision: str = "fp32",
    lean: bool | None = None,
    status: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and what ``cluster_nce_bwd`` needs: ``stats`` (4, B) and the logits (B, C), (B, 0) when lean.

    Two launches. ``lean`` stores no logits; None decides by ``is_lean``. Arguments as in ``cluster_nce``.
    """
    (b, d), c = x.shape, len(memory)
    lean = is_lean(b, c) if lean is None else lean
    loss = torch.empty(b if reduction == "none" else (), dtype=torch.float32, device=x.device)
    stats = torch.empty(4, b, dtype=torch.float32, device=x.device)
    logits = torch.empty(b, 0 if lean else c, dtype=torch.float32, device=x.device)
    if b == 0:
        return loss.zero_(), stats, logits
    x, memory, targets = _rows(x), _rows(memory), targets.contiguous()
    block_b, block_c, block_d, warps = FORWARD_TILE[_number_bytes(x, memory)]
    tiles = triton.cdiv(triton.cdiv(c, block_c), MAX_SPLITS)
    splits = triton.cdiv(c, tiles * block_c)
    partial = torch.empty(3 * splits + 1, b, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _cluster_nce_logits_kernel[(triton.cdiv(b, block_b), splits)](
            x, memory, targets, logits, partial, stats, x.stride(0), memory.stride(0), logits.stride(0),
            b, 0, c, d, 1 / temperature, tiles,
            NORMALIZE=normalize, STORE=not lean, SUM=True, UPCAST=_upcast(x, memory), PRECISION=PRECISIONS[precision],
            BLOCK_B=block_b, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
        block_s = triton.next_power_of_2(splits)
        _cluster_nce_loss_kernel[(1,)](
            partial, stats, targets, targets if weight is None else weight.contiguous(), loss,
            targets if status is None else status, b, c, splits, ignore_index,
            WEIGHTED=weight is not None, REDUCTION=reduction, HAS_STATUS=status is not None,
            BLOCK_B=min(triton.next_power_of_2(b), 4096 // block_s), BLOCK_S=block_s, num_warps=8,
        )  # fmt: skip
    return loss, stats, logits


def cluster_nce_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    stats: torch.Tensor,
    logits: torch.Tensor,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    ignore_index: int = -1,
    precision: str = "fp32",
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
    x, memory, targets = _rows(x), _rows(memory), targets.contiguous()
    scale, precision, stride_g = 1 / temperature, PRECISIONS[precision], grad.stride(0) if grad.ndim else 0
    block_b, block_c, block_d, warps = BACKWARD_TILE[_number_bytes(x, memory)]
    grid = triton.cdiv(b, block_b), triton.cdiv(d, block_d)

    lean = logits.shape[1] < c
    width = c
    if lean:
        tile_b, tile_c, tile_d, tile_warps = FORWARD_TILE[_number_bytes(x, memory)]
        width = min(c, max(LEAN_BYTES // (4 * b) // tile_c, 1) * tile_c)
        logits = torch.empty(b, width, dtype=torch.float32, device=x.device)
    splits = min(triton.cdiv(96, grid[0] * grid[1]), triton.cdiv(width, 8 * block_c))
    tiles = triton.cdiv(triton.cdiv(width, block_c), splits)
    finish = splits == 1 and not lean
    partial = x if finish or not need_x else torch.empty(splits, b, d, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        for first in range(0, c, width):
            last = min(first + width, c)
            if lean:
                _cluster_nce_logits_kernel[(triton.cdiv(b, tile_b), triton.cdiv(last - first, tile_c))](
                    x, memory, targets, logits, logits, stats, x.stride(0), memory.stride(0), logits.stride(0),
                    b, first, last, d, scale, 1,
                    NORMALIZE=normalize, STORE=True, SUM=False, UPCAST=_upcast(x, memory), PRECISION=precision,
                    BLOCK_B=tile_b, BLOCK_C=tile_c, BLOCK_D=tile_d, num_warps=tile_warps,
                )  # fmt: skip
            if need_x:
                _cluster_nce_grad_x_kernel[(*grid, splits)](
                    logits, memory, x, stats, targets, grad, partial, grad_x,
                    logits.stride(0), memory.stride(0), x.stride(0), stride_g,
                    b, first, last, d, scale, tiles, ignore_index,
                    NORMALIZE=normalize, FINISH=finish, ADD=first > 0, PRECISION=precision,
                    BLOCK_B=block_b, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps,
                )  # fmt: skip
            if need_memory:
                _cluster_nce_grad_memory_kernel[(triton.cdiv(last - first, block_b), grid[1])](
                    logits, x, stats, targets, grad, grad_memory,
                    logits.stride(0), x.stride(0), stride_g, b, first, last, d, scale, ignore_index,
                    PRECISION=precision, BLOCK_B=block_c, BLOCK_C=block_b, BLOCK_D=block_d, num_warps=warps,
                )  # fmt: skip
        if need_x and not finish:
            _cluster_nce_finish_kernel[(triton.cdiv(b, 8), grid[1])](
                partial, x, stats, targets, grad, grad_x, x.stride(0), stride_g, b, d, scale, ignore_index, splits,
                NORMALIZE=normalize, BLOCK_B=8, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
    return grad_x, grad_memory


class _ClusterNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, targets, memory, forward_only, both):
        loss, stats, logits = cluster_nce_fwd(x, targets, memory, **forward_only, **both)
        ctx.save_for_backward(x, targets, memory, stats, logits)
        ctx.both = both
        return loss

    @staticmethod
    def backward(ctx, grad):
        need_x, _, need_memory, *_ = ctx.needs_input_grad
        needs = {"need_x": need_x, "need_memory": need_memory}
        grad_x, grad_memory = cluster_nce_bwd(grad, *ctx.saved_tensors, **ctx.both, **needs)
        return grad_x, None, grad_memory, None, None


def cluster_nce(
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    weight: torch.Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    precision: str = "fp32",
    lean: bool | None = None,
    status: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``l2(x) @ memory.T / temperature``, differentiable with respect to ``x`` and ``memory``.

    Args:
        x: (B, D) float32, float16 or bfloat16, normalised here unless ``normalize`` is False.
        targets: (B,) integers in 0 .. C - 1, or ``ignore_index``. Any other makes the loss NaN.
        memory: (C, D), the same choice of dtypes, C >= 1.
        weight: (B,) factors on the loss of each sample.
        reduction: "mean" over the samples that take part, "sum" or "none".
        precision: "fp32" (split products on tensor cores) or "tf32".
        lean: never store the logits; None does so where they would take more than ``STORED_BYTES``.
        status: (1,) int32, or-ed with ``BAD_TARGET`` if a target is out of range.

    Returns the float32 loss. Memory beyond inputs and gradients: 4 B C bytes up to 64 MiB; lean, about 16 MiB + 16 B D.
    """
    if memory.ndim != 2 or x.ndim != 2 or memory.shape[1] != x.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"{tuple(x.shape)}, {tuple(targets.shape)}, {tuple(memory.shape)}"
        raise ValueError(f"cluster_nce: x, targets, memory must be (B, D), (B,), (C, D), got {shapes}")
    if len(memory) == 0:
        raise ValueError(f"cluster_nce: memory must have at least one row, got shape {tuple(memory.shape)}")
    for name, tensor in (("x", x), ("memory", memory)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"cluster_nce: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cluster_nce: reduction must be one of 'mean', 'sum', 'none', got {reduction!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"cluster_nce: precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    both = {"temperature": temperature, "normalize": normalize, "ignore_index": ignore_index, "precision": precision}
    forward_only = {"weight": weight, "reduction": reduction, "lean": lean, "status": status}
    return _ClusterNCE.apply(x, targets, memory, forward_only, both)


def is_lean(b: int, c: int) -> bool:
    """Whether (b, c) logits are too many to keep for the backward."""
    return 4 * b * c > STORED_BYTES


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels step along a row by one."""
    return x if x.stride(1) == 1 else x.contiguous()


def _number_bytes(x: torch.Tensor, memory: torch.Tensor) -> int:
    return max(x.element_size(), memory.element_size())


def _upcast(x: torch.Tensor, memory: torch.Tensor) -> bool:
    """Two dtypes meet in float32; so does bfloat16 on a CPU, where Triton's interpreter multiplies it wrongly."""
    return x.dtype != memory.dtype or (x.dtype == torch.bfloat16 and x.device.type == "cpu")

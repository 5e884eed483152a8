# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss of a batch against a memory of prototypes, forward and backward (Triton).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Methods: Cluster Contrast (Dai et al., ACCV 2022, equation 1), SpCL, CACL, DCCC, PPLR; oracle and formulas:
fastreid_u/reference/cluster_nce.py.  Cost: 4 B C D multiply-adds forward and backward, 6 with a teacher; memory read
twice.

With l = l2(x) @ memory.T / T, p = softmax(l), y the target and t the distribution it becomes, the loss of a sample is
F S with S = -sum_c t_c log p_c and the focal factor F = (1 - p_y)^g, and

    d loss / d l_c = (F sum t + G) p_c - F t_c - G [c = y]              G = g (1 - p_y)^(g - 1) p_y S
    d loss / d x   = ((d loss / d l) @ memory / T - x̂ slope) / |x|      slope = sum_c l_c d loss / d l_c,  x̂ = x / |x|

Every option is a coefficient of a sample on p, on [c = y], on the teacher's softmax, on 1, on the extra target. The
slope is the part of the gradient along x̂, which the normalisation removes. Loss, coefficients and slope come out of
sums over the classes that the forward makes on the fly, so the backward needs no pass over a finished gradient. Small
batches store their logits once and take three launches in all; past ``STORED_BYTES`` the backward makes them again, a
block of classes at a time ("lean").

Nothing is accumulated by atomics and no tile depends on the device: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

STORED_BYTES = 64 * 2**20  # logits up to this size are kept for the backward
LEAN_BYTES = 16 * 2**20  # one block of the logits that a lean backward makes again
MAX_SPLITS = 128  # programs that share the classes of one block of samples
BAD_TARGET, MASKED_TARGET = 1, 8  # bits of `status`; 2 and 4 belong to other kernels
EPS = tl.constexpr(1e-12)  # smallest length that divides, as in torch.nn.functional.normalize
# rows of `stats`, (9, B) float32: what the forward leaves for the backward; the last five are coefficients of
# d loss / d l on p, on the target's class, on the teacher's distribution, on every class, on the extra target
STATS = 9
LSE, TEACHER_LSE, INV_NORM, SLOPE, OF_P, OF_TARGET, OF_TEACHER, OF_ONE, OF_EXTRA = (tl.constexpr(i) for i in range(9))
# rows of `partial`, (10, B, splits) float32 and then (B,) logits of the targets: sums over a split's classes; for p and
# the teacher the largest logit, the sum of exp, the sum of exp times the student's logit
SUMS = tl.constexpr(10)
P_SUMS, TEACHER_SUMS, CLASSES, LOGIT_SUM, EXTRA_SUM, EXTRA_LOGITS = (tl.constexpr(i) for i in (0, 3, 6, 7, 8, 9))


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


@triton.jit
def _joined(sums, live, live_b, stride):
    """Log-sum-exp, and the mean under the softmax, of what ``_add_exponentials`` left for each split."""
    highest = tl.load(sums, mask=live, other=float("-inf"))
    total = tl.load(sums + stride, mask=live, other=0.0)
    weighted = tl.load(sums + 2 * stride, mask=live, other=0.0)
    top = tl.where(live_b, tl.max(highest, axis=1), 0.0)
    rescale = tl.where(live, tl.exp(highest - top[:, None]), 0.0)
    total = tl.where(live_b, tl.sum(total * rescale, axis=1), 1.0)
    return top + tl.log(total), tl.sum(weighted * rescale, axis=1) / total


@triton.jit
def _share(given, b, live_b, EACH: tl.constexpr):
    """A part of the target: one number for all samples, or a pointer to one each."""
    share = tl.zeros(b.shape, tl.float32)
    if EACH:
        share += tl.load(given + b, mask=live_b, other=0.0).to(tl.float32)
    else:
        share += given
    return share


@triton.jit(do_not_specialize=["B", "C", "splits", "ignore_index"])
def _cluster_nce_loss_kernel(
    partial_ptr,  # fp32: [SUMS, B, splits], [B]
    stats_ptr,  # [STATS, B] fp32, all but INV_NORM written
    targets_ptr,  # [B] int
    weight_ptr,  # [B] any float, read if WEIGHTED
    loss_ptr,  # [] or [B] fp32
    status_ptr,  # [1] int32, written if HAS_STATUS
    teacher_share, smoothing, extra_share,  # a number, or [B] any float if _EACH
    B, C, splits, ignore_index,
    focal, epsilon,
    WEIGHTED: tl.constexpr, REDUCTION: tl.constexpr, HAS_STATUS: tl.constexpr,
    TEACHER: tl.constexpr, UNIFORM: tl.constexpr, EXTRA: tl.constexpr, FOCAL: tl.constexpr, EPSILON: tl.constexpr,
    TEACHER_EACH: tl.constexpr, SMOOTHING_EACH: tl.constexpr, EXTRA_EACH: tl.constexpr,
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
    stride = B * splits
    loss_sum = tl.zeros([BLOCK_B], tl.float32)
    wrong = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live_b = b < B
        sums = partial_ptr + b[:, None] * splits + s[None, :]
        live = live_b[:, None] & (s < splits)[None, :]
        lse, mean_logit = _joined(sums + P_SUMS * stride, live, live_b, stride)
        if EPSILON:  # one more class of probability epsilon / sum, that no target names
            log_epsilon = tl.log(tl.full([BLOCK_B], epsilon, tl.float32))
            larger = tl.maximum(lse, log_epsilon)
            with_epsilon = larger + tl.log(tl.exp(lse - larger) + tl.exp(log_epsilon - larger))
            mean_logit *= tl.exp(lse - with_epsilon)
            lse = with_epsilon

        target = tl.load(targets_ptr + b, mask=live_b, other=0)
        kept = live_b & (target != ignore_index)
        legal = (target >= 0) & (target < C)
        target_logit = tl.load(partial_ptr + SUMS * stride + b, mask=kept & legal, other=float("nan"))
        masked = target_logit == float("-inf")
        wrong |= tl.where(kept & (legal == 0), 1, tl.where(kept & masked, 8, 0))
        target_logit = tl.where(masked, float("nan"), target_logit)

        # The cross-entropy S, the target's mass, and the sum of the target times the logits but for its one class.
        p = tl.exp(target_logit - lse)
        hard = tl.full([BLOCK_B], 1.0, tl.float32)
        entropy = tl.zeros([BLOCK_B], tl.float32)
        mass = tl.zeros([BLOCK_B], tl.float32)
        soft_logits = tl.zeros([BLOCK_B], tl.float32)
        teacher_lse = tl.zeros([BLOCK_B], tl.float32)
        of_teacher = tl.zeros([BLOCK_B], tl.float32)
        of_one = tl.zeros([BLOCK_B], tl.float32)
        of_extra = tl.zeros([BLOCK_B], tl.float32)
        if TEACHER:
            share = _share(teacher_share, b, live_b, TEACHER_EACH)
            teacher_lse, teacher_logit = _joined(sums + TEACHER_SUMS * stride, live, live_b, stride)
            of_teacher = share
            hard -= share
            mass += share
            entropy += share * (lse - teacher_logit)
            soft_logits += share * teacher_logit
        if UNIFORM:
            share = _share(smoothing, b, live_b, SMOOTHING_EACH)
            classes = tl.maximum(tl.sum(tl.load(sums + CLASSES * stride, mask=live, other=0.0), axis=1), 1.0)
            logit = tl.sum(tl.load(sums + LOGIT_SUM * stride, mask=live, other=0.0), axis=1) / classes
            of_one = share / classes
            hard -= share
            mass += share
            entropy += share * (lse - logit)
            soft_logits += share * logit
        if EXTRA:
            share = _share(extra_share, b, live_b, EXTRA_EACH)
            extra_sum = tl.sum(tl.load(sums + EXTRA_SUM * stride, mask=live, other=0.0), axis=1)
            extra_logits = tl.sum(tl.load(sums + EXTRA_LOGITS * stride, mask=live, other=0.0), axis=1)
            of_extra = share
            hard -= share
            mass += share * extra_sum
            entropy += share * (extra_sum * lse - extra_logits)
            soft_logits += share * extra_logits
        of_target = hard
        if EPSILON:
            entropy += hard * -tl.log(p + epsilon)
            of_target = hard * p / (p + epsilon)
        else:
            entropy += hard * (lse - target_logit)

        coefficient = tl.full([BLOCK_B], 1.0, tl.float32)
        if WEIGHTED:
            coefficient = tl.load(weight_ptr + b, mask=live_b, other=0.0).to(tl.float32)
        loss = entropy * coefficient
        coefficient /= divisor
        through_focal = tl.zeros([BLOCK_B], tl.float32)
        if FOCAL:
            left = tl.maximum(1.0 - p, 1e-37)
            power = tl.exp((focal - 1.0) * tl.log(left))
            loss *= power * left
            through_focal = coefficient * focal * power * p * entropy
            coefficient *= power * left
        loss = tl.where(kept, loss, 0.0)
        loss_sum += loss
        of_p = coefficient * (of_target + mass) + through_focal
        of_target = coefficient * of_target + through_focal
        slope = of_p * mean_logit - of_target * target_logit - coefficient * soft_logits
        tl.store(stats_ptr + LSE * B + b, lse, mask=live_b)
        tl.store(stats_ptr + TEACHER_LSE * B + b, teacher_lse, mask=live_b)
        tl.store(stats_ptr + SLOPE * B + b, tl.where(kept, slope, 0.0), mask=live_b)
        tl.store(stats_ptr + OF_P * B + b, tl.where(kept, of_p, 0.0), mask=live_b)
        tl.store(stats_ptr + OF_TARGET * B + b, tl.where(kept, of_target, 0.0), mask=live_b)
        tl.store(stats_ptr + OF_TEACHER * B + b, tl.where(kept, coefficient * of_teacher, 0.0), mask=live_b)
        tl.store(stats_ptr + OF_ONE * B + b, tl.where(kept, coefficient * of_one, 0.0), mask=live_b)
        tl.store(stats_ptr + OF_EXTRA * B + b, tl.where(kept, coefficient * of_extra, 0.0), mask=live_b)
        if REDUCTION == "none":
            tl.store(loss_ptr + b, loss, mask=live_b)
    if REDUCTION != "none":
        tl.store(loss_ptr, tl.sum(loss_sum) / divisor)
    if HAS_STATUS:
        bits = tl.max(wrong & 1) | tl.max(wrong & 8)
        if bits != 0:
            tl.atomic_or(status_ptr, bits)


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


# samples, classes, columns of a tile, warps; literals, because autotuning would make bits depend on timing
# and by bytes of a number, the largest that keep within the registers of sm_80, sm_90 and sm_100
FORWARD_TILE = {4: (64, 64, 32, 8), 2: (64, 64, 64, 8)}
BACKWARD_TILE = {4: (64, 32, 64, 8), 2: (64, 16, 64, 8)}
# the same with a teacher or an extra target: more numbers to keep for each pair of a sample and a class
DENSE_FORWARD_TILE = {4: (32, 64, 32, 8), 2: (32, 64, 64, 8)}
DENSE_BACKWARD_TILE = {4: (64, 16, 64, 8), 2: (64, 16, 64, 8)}
SUMS_TILE, DENSE_SUMS_TILE = 4096, 2048  # samples times splits that the loss kernel takes at a time
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32"}  # tf32x3: three products of rounded halves, as accurate as float32


def cluster_nce_fwd(
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    teacher: torch.Tensor | None = None,
    teacher_weight: float | torch.Tensor = 0.0,
    teacher_temperature: float | None = None,
    smoothing: float | torch.Tensor = 0.0,
    extra_target: torch.Tensor | None = None,
    extra_weight: float | torch.Tensor = 0.0,
    focal: float = 0.0,
    epsilon: float = 0.0,
    class_mask: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    precision: str = "fp32",
    lean: bool | None = None,
    status: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and what ``cluster_nce_bwd`` needs: ``stats`` (9, B), and logits (B, C), with a teacher (2 B, C).

    Two launches. ``lean`` stores no logits, (.., 0); None decides by ``is_lean``. Arguments as in ``cluster_nce``.
    """
    (b, d), c = x.shape, len(memory)
    has_teacher, has_extra, uniform = teacher is not None, extra_target is not None, is_given(smoothing)
    lean = is_lean(b, c, has_teacher) if lean is None else lean
    loss = torch.empty(b if reduction == "none" else (), dtype=torch.float32, device=x.device)
    stats = torch.empty(STATS, b, dtype=torch.float32, device=x.device)
    logits = torch.empty((1 + has_teacher) * b, 0 if lean else c, dtype=torch.float32, device=x.device)
    if b == 0:
        return loss.zero_(), stats, logits
    x, memory, targets = _rows(x), _rows(memory), targets.contiguous()
    teacher, extra = _rows(teacher) if has_teacher else x, _rows(extra_target) if has_extra else x
    dense = has_teacher or has_extra
    tile = DENSE_FORWARD_TILE if dense else FORWARD_TILE
    block_b, block_c, block_d, warps = tile[_number_bytes(x, memory)]
    tiles = triton.cdiv(triton.cdiv(c, block_c), MAX_SPLITS)
    splits = triton.cdiv(c, tiles * block_c)
    partial = torch.empty(SUMS.value * splits + 1, b, dtype=torch.float32, device=x.device)
    shares = [s.contiguous() if isinstance(s, torch.Tensor) else s for s in (teacher_weight, smoothing, extra_weight)]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _cluster_nce_logits_kernel[(triton.cdiv(b, block_b), splits)](
            x, memory, targets, teacher, extra, targets if class_mask is None else class_mask.contiguous(),
            logits, partial, stats, x.stride(0), memory.stride(0), teacher.stride(0), extra.stride(0), logits.stride(0),
            b, 0, c, d, 1 / temperature, 1 / (teacher_temperature or temperature), tiles,
            NORMALIZE=normalize, STORE=not lean, SUM=True, TEACHER=has_teacher, UNIFORM=uniform, EXTRA=has_extra,
            MASKED=class_mask is not None, UPCAST=_upcast(x, memory, teacher), PRECISION=PRECISIONS[precision],
            BLOCK_B=block_b, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
        block_s = triton.next_power_of_2(splits)
        _cluster_nce_loss_kernel[(1,)](
            partial, stats, targets, targets if weight is None else weight.contiguous(), loss,
            targets if status is None else status, *shares, b, c, splits, ignore_index,
            float(focal), float(epsilon),
            WEIGHTED=weight is not None, REDUCTION=reduction, HAS_STATUS=status is not None,
            TEACHER=has_teacher, UNIFORM=uniform, EXTRA=has_extra, FOCAL=focal > 0, EPSILON=epsilon > 0,
            TEACHER_EACH=isinstance(shares[0], torch.Tensor), SMOOTHING_EACH=isinstance(shares[1], torch.Tensor),
            EXTRA_EACH=isinstance(shares[2], torch.Tensor),
            BLOCK_B=min(triton.next_power_of_2(b), (DENSE_SUMS_TILE if dense else SUMS_TILE) // block_s),
            BLOCK_S=block_s, num_warps=8,
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
    teacher: torch.Tensor | None = None,
    teacher_temperature: float | None = None,
    uniform: bool = False,
    extra_target: torch.Tensor | None = None,
    class_mask: torch.Tensor | None = None,
    ignore_index: int = -1,
    precision: str = "fp32",
    need_x: bool = True,
    need_memory: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients to ``x`` and ``memory`` in their own dtypes, None where not needed; ``grad`` is that of the loss.

    One launch for ``x``, two where the classes are split too, one more for ``memory``; lean, so for each block of them.
    ``uniform`` says that the loss was smoothed.
    """
    (b, d), c = x.shape, len(memory)
    has_teacher, has_extra = teacher is not None, extra_target is not None
    grad_x = torch.empty(b, d, dtype=x.dtype, device=x.device) if need_x else None
    grad_memory = torch.empty(c, d, dtype=memory.dtype, device=x.device) if need_memory else None
    if b == 0:
        return grad_x, grad_memory.zero_() if need_memory else None
    x, memory, targets = _rows(x), _rows(memory), targets.contiguous()
    teacher, extra = _rows(teacher) if has_teacher else x, _rows(extra_target) if has_extra else x
    scale, precision, stride_g = 1 / temperature, PRECISIONS[precision], grad.stride(0) if grad.ndim else 0
    dense = has_teacher or has_extra
    tile = DENSE_BACKWARD_TILE if dense else BACKWARD_TILE
    block_b, block_c, block_d, warps = tile[_number_bytes(x, memory)]
    grid = triton.cdiv(b, block_b), triton.cdiv(d, block_d)

    lean = logits.shape[1] < c
    width = c
    if lean:
        tile = DENSE_FORWARD_TILE if dense else FORWARD_TILE
        tile_b, tile_c, tile_d, tile_warps = tile[_number_bytes(x, memory)]
        # at least a tile, and no more of them than the second axis of a grid has
        width = min(c, max(1, min(LEAN_BYTES // (4 * len(logits)) // tile_c, 65_535)) * tile_c)
        logits = torch.empty(len(logits), width, dtype=torch.float32, device=x.device)
    splits = min(triton.cdiv(96, grid[0] * grid[1]), triton.cdiv(width, 8 * block_c))
    tiles = triton.cdiv(triton.cdiv(width, block_c), splits)
    finish = splits == 1 and not lean
    partial = x if finish or not need_x else torch.empty(splits, b, d, dtype=torch.float32, device=x.device)
    soft = {"TEACHER": has_teacher, "UNIFORM": uniform, "EXTRA": has_extra}
    with torch.cuda.device_of(x):
        for first in range(0, c, width):
            last = min(first + width, c)
            if lean:
                _cluster_nce_logits_kernel[(triton.cdiv(b, tile_b), triton.cdiv(last - first, tile_c))](
                    x, memory, targets, teacher, extra, targets if class_mask is None else class_mask.contiguous(),
                    logits, logits, stats, x.stride(0), memory.stride(0), teacher.stride(0), 0, logits.stride(0),
                    b, first, last, d, scale, 1 / (teacher_temperature or temperature), 1,
                    NORMALIZE=normalize, STORE=True, SUM=False, TEACHER=has_teacher, UNIFORM=False, EXTRA=False,
                    MASKED=class_mask is not None, UPCAST=_upcast(x, memory, teacher), PRECISION=precision,
                    BLOCK_B=tile_b, BLOCK_C=tile_c, BLOCK_D=tile_d, num_warps=tile_warps,
                )  # fmt: skip
            if need_x:
                _cluster_nce_grad_x_kernel[(*grid, splits)](
                    logits, memory, x, extra, stats, targets, grad, partial, grad_x,
                    logits.stride(0), memory.stride(0), x.stride(0), extra.stride(0), stride_g,
                    b, first, last, d, scale, tiles, ignore_index,
                    NORMALIZE=normalize, **soft, FINISH=finish, ADD=first > 0, PRECISION=precision,
                    BLOCK_B=block_b, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps,
                )  # fmt: skip
            if need_memory:
                _cluster_nce_grad_memory_kernel[(triton.cdiv(last - first, block_b), grid[1])](
                    logits, x, extra, stats, targets, grad, grad_memory,
                    logits.stride(0), x.stride(0), extra.stride(0), stride_g, b, first, last, d, scale, ignore_index,
                    **soft, PRECISION=precision, BLOCK_B=block_c, BLOCK_C=block_b, BLOCK_D=block_d, num_warps=warps,
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
        ctx.both = both | {"uniform": is_given(forward_only["smoothing"])}
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
    teacher: torch.Tensor | None = None,
    teacher_weight: float | torch.Tensor = 0.0,
    teacher_temperature: float | None = None,
    smoothing: float | torch.Tensor = 0.0,
    extra_target: torch.Tensor | None = None,
    extra_weight: float | torch.Tensor = 0.0,
    focal: float = 0.0,
    epsilon: float = 0.0,
    class_mask: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    precision: str = "fp32",
    lean: bool | None = None,
    status: torch.Tensor | None = None,
) -> torch.Tensor:
    """``-(1 - p_y)^focal sum_c t_c log p_c``, differentiable with respect to ``x`` and ``memory``.

    ``p = softmax(l2(x) @ memory.T / temperature)``; ``t`` is ``teacher_weight`` times the teacher's softmax, plus
    ``smoothing`` over the number of classes, plus ``extra_weight`` times ``extra_target``, and the rest of 1 on the
    target. With ``epsilon``, which needs a plain target, ``p_c = e_c / (sum e + epsilon)`` and ``log(p_y + epsilon)``.

    Args:
        x: (B, D) float32, float16 or bfloat16, normalised here unless ``normalize`` is False.
        targets: (B,) integers in 0 .. C - 1, or ``ignore_index``. Any other makes the loss NaN.
        memory: (C, D), the same choice of dtypes, C >= 1.
        teacher: (B, D) floating point, normalised as ``x`` is.
        teacher_weight, smoothing, extra_weight: in [0, 1], a number or (B,).
        extra_target: (B, C) floating point.
        focal: 0, or at least 1.
        class_mask: (C,) bool, False for classes that take no part; as a target such a class makes the loss NaN.
        weight: (B,) factors on the loss of each sample.
        reduction: "mean" over the samples that take part, "sum" or "none".
        precision: "fp32" (split products on tensor cores) or "tf32".
        lean: never store the logits; None does so where they would take more than ``STORED_BYTES``.
        status: (1,) int32, or-ed with ``BAD_TARGET`` if a target is out of range, ``MASKED_TARGET`` if it is masked.

    Returns the float32 loss. Memory beyond inputs and gradients: 4 B C bytes up to 64 MiB, 8 B C with a teacher; lean,
    about 16 MiB + 16 B D.
    """
    if memory.ndim != 2 or x.ndim != 2 or memory.shape[1] != x.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"{tuple(x.shape)}, {tuple(targets.shape)}, {tuple(memory.shape)}"
        raise ValueError(f"cluster_nce: x, targets, memory must be (B, D), (B,), (C, D), got {shapes}")
    if len(memory) == 0:
        raise ValueError(f"cluster_nce: memory must have at least one row, got shape {tuple(memory.shape)}")
    for name, tensor in (("x", x), ("memory", memory)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"cluster_nce: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    b, c = len(x), len(memory)
    for name, given, shape in (
        ("teacher", teacher, tuple(x.shape)), ("extra_target", extra_target, (b, c)), ("class_mask", class_mask, (c,)),
        ("weight", weight, (b,)), ("teacher_weight", teacher_weight, (b,)), ("smoothing", smoothing, (b,)),
        ("extra_weight", extra_weight, (b,)),
    ):  # fmt: skip
        if isinstance(given, torch.Tensor) and given.shape != shape:
            raise ValueError(f"cluster_nce: {name} must have shape {shape}, got {tuple(given.shape)}")
    if 0 < focal < 1 or focal < 0:
        raise ValueError(f"cluster_nce: focal must be 0 or at least 1, got {focal!r}")
    if epsilon > 0 and (teacher is not None or extra_target is not None or is_given(smoothing)):
        raise ValueError(f"cluster_nce: epsilon must be 0 with a teacher, smoothing or extra_target, got {epsilon!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cluster_nce: reduction must be one of 'mean', 'sum', 'none', got {reduction!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"cluster_nce: precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    both = {
        "temperature": temperature, "normalize": normalize, "teacher": teacher, "extra_target": extra_target,
        "teacher_temperature": teacher_temperature, "class_mask": class_mask, "ignore_index": ignore_index,
        "precision": precision,
    }  # fmt: skip
    forward_only = {
        "teacher_weight": teacher_weight, "smoothing": smoothing, "extra_weight": extra_weight, "focal": focal,
        "epsilon": epsilon, "weight": weight, "reduction": reduction, "lean": lean, "status": status,
    }  # fmt: skip
    return _ClusterNCE.apply(x, targets, memory, forward_only, both)


def is_lean(b: int, c: int, teacher: bool = False) -> bool:
    """Whether (b, c) logits, and as many of a teacher, are too many to keep for the backward."""
    return 4 * b * c * (1 + teacher) > STORED_BYTES


def is_given(share: float | torch.Tensor) -> bool:
    """Whether a part of the target is there: one number each always is."""
    return isinstance(share, torch.Tensor) or share > 0


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels step along a row by one."""
    return x if x.stride(1) == 1 else x.contiguous()


def _number_bytes(x: torch.Tensor, memory: torch.Tensor) -> int:
    return max(x.element_size(), memory.element_size())


def _upcast(x: torch.Tensor, memory: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Other dtypes meet in float32; so does bfloat16 on a CPU, where Triton's interpreter multiplies it wrongly."""
    return len({x.dtype, memory.dtype, teacher.dtype}) > 1 or (x.dtype == torch.bfloat16 and x.device.type == "cpu")

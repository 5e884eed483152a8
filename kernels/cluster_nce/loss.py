# SPDX-License-Identifier: Apache-2.0
"""The forward: the loss, and for the backward what it needs to know of each sample."""

import torch
import triton
import triton.language as tl

from .layout import (
    CLASSES,
    EXTRA_LOGITS,
    EXTRA_SUM,
    LOGIT_SUM,
    LSE,
    OF_EXTRA,
    OF_ONE,
    OF_P,
    OF_TARGET,
    OF_TEACHER,
    P_SUMS,
    SLOPE,
    STATS,
    SUMS,
    TEACHER_LSE,
    TEACHER_SUMS,
    as_rows,
)
from .logits import forward_tile, launch_logits
from .settings import Settings, is_lean

MAX_SPLITS = 128  # programs that share the classes of one block of samples
SUMS_TILE, DENSE_SUMS_TILE = 4096, 2048  # samples times splits that the loss kernel takes at a time


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
    # One program takes the whole batch, BLOCK_B samples at a time: the batch is small, and its sum has one order.
    # First it counts the samples that take part, which a mean divides by.
    kept_count = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        target = tl.load(targets_ptr + b, mask=b < B, other=0)
        kept_count += ((target != ignore_index) & (b < B)).to(tl.float32)
    divisor = 1.0
    if REDUCTION == "mean":
        divisor = tl.maximum(tl.sum(kept_count), 1.0)

    s = tl.arange(0, BLOCK_S)  # all splits at once
    stride = B * splits  # from one row of `partial` to the next
    loss_sum = tl.zeros([BLOCK_B], tl.float32)
    wrong = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live_b = b < B
        # From sums of the splits to those of all classes: log-sum-exp, and the mean logit under the softmax.
        sums = partial_ptr + b[:, None] * splits + s[None, :]
        live = live_b[:, None] & (s < splits)[None, :]
        lse, mean_logit = _joined(sums + P_SUMS * stride, live, live_b, stride)
        # SpCL's epsilon is one more class, of logit log(epsilon), that no target names and no mean logit counts.
        if EPSILON:
            log_epsilon = tl.log(tl.full([BLOCK_B], epsilon, tl.float32))
            larger = tl.maximum(lse, log_epsilon)
            with_epsilon = larger + tl.log(tl.exp(lse - larger) + tl.exp(log_epsilon - larger))
            mean_logit *= tl.exp(lse - with_epsilon)
            lse = with_epsilon

        # The logit of each target. One that is out of range or masked makes the loss of its sample NaN, and sets a bit.
        target = tl.load(targets_ptr + b, mask=live_b, other=0)
        kept = live_b & (target != ignore_index)
        legal = (target >= 0) & (target < C)
        target_logit = tl.load(partial_ptr + SUMS * stride + b, mask=kept & legal, other=float("nan"))
        masked = target_logit == float("-inf")
        wrong |= tl.where(kept & (legal == 0), 1, tl.where(kept & masked, 8, 0))
        target_logit = tl.where(masked, float("nan"), target_logit)

        # The target distribution t, one part after the other. What a part takes, the one class of the target loses.
        p = tl.exp(target_logit - lse)
        hard = tl.full([BLOCK_B], 1.0, tl.float32)  # t at the one class, in the end
        entropy = tl.zeros([BLOCK_B], tl.float32)  # S = -sum_c t_c log p_c
        mass = tl.zeros([BLOCK_B], tl.float32)  # sum_c t_c without the one class
        soft_logits = tl.zeros([BLOCK_B], tl.float32)  # sum_c t_c l_c without the one class
        teacher_lse = tl.zeros([BLOCK_B], tl.float32)
        of_teacher = tl.zeros([BLOCK_B], tl.float32)
        of_one = tl.zeros([BLOCK_B], tl.float32)
        of_extra = tl.zeros([BLOCK_B], tl.float32)
        if TEACHER:  # share times the teacher's softmax: its sum is 1, and its mean logit was summed by the forward
            share = _share(teacher_share, b, live_b, TEACHER_EACH)
            teacher_lse, teacher_logit = _joined(sums + TEACHER_SUMS * stride, live, live_b, stride)
            of_teacher = share
            hard -= share
            mass += share
            entropy += share * (lse - teacher_logit)
            soft_logits += share * teacher_logit
        if UNIFORM:  # share over the number of classes that are not masked
            share = _share(smoothing, b, live_b, SMOOTHING_EACH)
            classes = tl.maximum(tl.sum(tl.load(sums + CLASSES * stride, mask=live, other=0.0), axis=1), 1.0)
            logit = tl.sum(tl.load(sums + LOGIT_SUM * stride, mask=live, other=0.0), axis=1) / classes
            of_one = share / classes
            hard -= share
            mass += share
            entropy += share * (lse - logit)
            soft_logits += share * logit
        if EXTRA:  # share times rows that may have any sum
            share = _share(extra_share, b, live_b, EXTRA_EACH)
            extra_sum = tl.sum(tl.load(sums + EXTRA_SUM * stride, mask=live, other=0.0), axis=1)
            extra_logits = tl.sum(tl.load(sums + EXTRA_LOGITS * stride, mask=live, other=0.0), axis=1)
            of_extra = share
            hard -= share
            mass += share * extra_sum
            entropy += share * (extra_sum * lse - extra_logits)
            soft_logits += share * extra_logits
        # The one class itself. With epsilon its loss is -log(p + epsilon): p / (p + epsilon) scales the gradient.
        of_target = hard
        if EPSILON:
            entropy += hard * -tl.log(p + epsilon)
            of_target = hard * p / (p + epsilon)
        else:
            entropy += hard * (lse - target_logit)

        # The loss of each sample; `coefficient` is the derivative of the reduced loss by the entropy.
        coefficient = tl.full([BLOCK_B], 1.0, tl.float32)
        if WEIGHTED:
            coefficient = tl.load(weight_ptr + b, mask=live_b, other=0.0).to(tl.float32)
        loss = entropy * coefficient
        coefficient /= divisor
        through_focal = tl.zeros([BLOCK_B], tl.float32)
        if FOCAL:  # (1 - p)^focal multiplies the loss and, since it moves with p, adds G of the module's docstring
            left = tl.maximum(1.0 - p, 1e-37)  # log(0) would make 0 * inf of a sample that is certain
            power = tl.exp((focal - 1.0) * tl.log(left))
            loss *= power * left
            through_focal = coefficient * focal * power * p * entropy
            coefficient *= power * left
        loss = tl.where(kept, loss, 0.0)
        loss_sum += loss
        # For the backward: d loss / d l_c = of_p p_c - of_target [c = y] - coefficient t_c (the soft parts), and its
        # sum times the logits, the slope. Samples that do not take part get zeros.
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


def cluster_nce_fwd(
    x: torch.Tensor,
    targets: torch.Tensor,
    memory: torch.Tensor,
    settings: Settings,
    *,
    lean: bool | None = None,
    status: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and what ``cluster_nce_bwd`` needs: ``stats`` (9, B), and logits (B, C), with a teacher (2 B, C).

    Two launches. ``lean`` stores no logits, (.., 0); None decides by ``is_lean``. Arguments as in ``cluster_nce``.
    """
    b, c, has_teacher = len(x), len(memory), settings.teacher is not None
    lean = is_lean(b, c, has_teacher) if lean is None else lean
    loss = torch.empty(b if settings.reduction == "none" else (), dtype=torch.float32, device=x.device)
    stats = torch.empty(STATS, b, dtype=torch.float32, device=x.device)
    logits = torch.empty((1 + has_teacher) * b, 0 if lean else c, dtype=torch.float32, device=x.device)
    if b == 0:
        return loss.zero_(), stats, logits
    x, memory, targets, settings = as_rows(x), as_rows(memory), targets.contiguous(), settings.laid_out()
    _, block_c, _, _ = forward_tile(x, memory, settings)
    tiles = triton.cdiv(triton.cdiv(c, block_c), MAX_SPLITS)
    splits = triton.cdiv(c, tiles * block_c)
    partial = torch.empty(SUMS.value * splits + 1, b, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        launch_logits(x, targets, memory, logits, stats, settings, first=0, last=c, partial=partial, tiles=tiles)
        _launch_loss(partial, splits, stats, targets, c, loss, status, settings)
    return loss, stats, logits


def _launch_loss(
    partial: torch.Tensor,
    splits: int,
    stats: torch.Tensor,
    targets: torch.Tensor,
    c: int,
    loss: torch.Tensor,
    status: torch.Tensor | None,
    settings: Settings,
) -> None:
    b, block_s = len(targets), triton.next_power_of_2(splits)
    shares = settings.teacher_weight, settings.smoothing, settings.extra_weight
    teacher_each, smoothing_each, extra_each = (isinstance(share, torch.Tensor) for share in shares)
    at_a_time = DENSE_SUMS_TILE if settings.is_dense else SUMS_TILE
    _cluster_nce_loss_kernel[(1,)](
        partial, stats, targets, targets if settings.weight is None else settings.weight, loss,
        targets if status is None else status, *shares, b, c, splits, settings.ignore_index,
        float(settings.focal), float(settings.epsilon),
        WEIGHTED=settings.weight is not None, REDUCTION=settings.reduction, HAS_STATUS=status is not None,
        **settings.soft, FOCAL=settings.focal > 0, EPSILON=settings.epsilon > 0,
        TEACHER_EACH=teacher_each, SMOOTHING_EACH=smoothing_each, EXTRA_EACH=extra_each,
        BLOCK_B=min(triton.next_power_of_2(b), at_a_time // block_s), BLOCK_S=block_s, num_warps=8,
    )  # fmt: skip

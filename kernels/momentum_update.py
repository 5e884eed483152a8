# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place and in one launch (Triton).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Method: Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, equations 2 and 3.
Oracle: fastreid_u/reference/momentum_update.py.  Cost: reads x once, reads and writes each touched row once.

One program per sample; the first sample of a row owns the row and walks the row's samples in batch order, so no two
programs write the same row and nothing is sorted. The bits of a row depend on D, the row and its own samples only, not
on B, C, the other samples or the order in which programs run.
"""

import torch
import triton
import triton.language as tl

RULES = {"sequential": 0, "hard": 1, "mean": 2}
BAD_TARGET = 1  # bits of `status`
BAD_FEATURE = 2
EPS = tl.constexpr(1e-12)  # smallest length that divides, as in torch.nn.functional.normalize
NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def _next_sample(targets_ptr, stride_t, row, after, B, BLOCK_B: tl.constexpr):
    """Smallest index above ``after`` whose target is ``row``; NEVER if there is none."""
    found = tl.full([], NEVER, tl.int32)
    start = (after + 1) // BLOCK_B * BLOCK_B
    while (start < B) & (found == NEVER):
        b = start + tl.arange(0, BLOCK_B)
        target = tl.load(targets_ptr + b.to(tl.int64) * stride_t, mask=b < B, other=-1)
        found = tl.min(tl.where((target == row) & (b > after), b, NEVER))
        start += BLOCK_B
    return found


@triton.jit
def _unit(v):
    return v / tl.maximum(tl.sqrt(tl.sum(v * v)), EPS)


@triton.jit(do_not_specialize=["B", "C"])
def _momentum_update_kernel(
    memory_ptr,  # [C, D] any float, changed
    x_ptr,  # [B, D] any float
    targets_ptr,  # [B] int
    found_inf_ptr,  # [1], read if HAS_FOUND_INF
    status_ptr,  # [1] int32, written if HAS_STATUS
    stride_mc, stride_md, stride_xb, stride_xd, stride_t,
    B, C, D,
    keep, take,  # weights of the old row and of the sample: momentum, 1 - momentum
    RULE: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_STATUS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    me = tl.program_id(0)
    if HAS_FOUND_INF:  # noqa: SIM102 - this one is decided by the compiler
        if tl.load(found_inf_ptr) != 0:
            return

    # One target out of range spoils the batch, so every program looks at all of them (B words, from L2).
    row = tl.load(targets_ptr + me.to(tl.int64) * stride_t).to(tl.int64)
    bad = 0
    earlier = 0
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        target = tl.load(targets_ptr + b.to(tl.int64) * stride_t, mask=b < B, other=-1)
        bad = tl.maximum(bad, tl.max(((target < -1) | (target >= C)).to(tl.int32)))
        earlier = tl.maximum(earlier, tl.max(((target == row) & (b < me)).to(tl.int32)))
    if bad != 0:
        if HAS_STATUS:  # noqa: SIM102
            if me == 0:
                tl.atomic_or(status_ptr, 1)
        return
    if (row < 0) | (earlier != 0):
        return

    d = tl.arange(0, BLOCK_D)
    live = d < D
    row_ptr = memory_ptr + row * stride_mc + d.to(tl.int64) * stride_md
    old = tl.load(row_ptr, mask=live, other=0.0).to(tl.float32)
    column_ptr = x_ptr + d.to(tl.int64) * stride_xd
    new = old  # sequential: the row so far; hard: the sample chosen so far; mean: the sum so far
    if RULE != 0:
        new = tl.zeros_like(old)
    lowest = tl.full([], float("inf"), tl.float32)
    finite = tl.full([], 1, tl.int32)
    count = tl.zeros([], tl.float32)

    b = me
    raw = tl.load(column_ptr + b.to(tl.int64) * stride_xb, mask=live, other=0.0)
    while b < B:
        # The next sample is on its way while this one is worked on: the walk is bound by latency.
        b_next = _next_sample(targets_ptr, stride_t, row, b, B, BLOCK_B)
        wanted = tl.where(b_next < B, D, 0)
        raw_next = tl.load(column_ptr + b_next.to(tl.int64) * stride_xb, mask=d < wanted, other=0.0)
        sample = raw.to(tl.float32)
        sq_norm = tl.sum(sample * sample)
        finite = tl.where(sq_norm < float("inf"), finite, 0)  # 0 for NaN too
        sample = sample / tl.maximum(tl.sqrt(sq_norm), EPS)
        if RULE == 0:
            new = _unit(keep * new + take * sample)
        elif RULE == 1:
            similarity = tl.sum(sample * old)
            closer = similarity < lowest  # strict: the first sample wins a tie
            new = tl.where(closer, sample, new)
            lowest = tl.where(closer, similarity, lowest)
        else:
            new += sample
            count += 1
        b = b_next
        raw = raw_next

    if RULE == 1:
        new = _unit(keep * old + take * new)
    elif RULE == 2:
        new = _unit(keep * old + take * (new / count))
    if finite != 0:
        tl.store(row_ptr, new.to(memory_ptr.dtype.element_ty), mask=live)
    elif HAS_STATUS:
        tl.atomic_or(status_ptr, 2)


def momentum_update_(
    memory: torch.Tensor,
    x: torch.Tensor,
    targets: torch.Tensor,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    found_inf: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> None:
    """``row = l2(momentum * row + (1 - momentum) * l2(x_b))`` in place, on ``memory``'s device.

    Args:
        memory: (C, D) float32, float16 or bfloat16, any strides; the arithmetic is float32, rounded once at the end.
        x: (B, D), the same choice of dtypes, any strides; every sample is scaled to unit length here.
        targets: (B,) integers, the row that each sample moves; -1 moves none.
        momentum: weight of the old row.
        rule: "sequential" moves a row by each of its samples in batch order, normalising after every one; "hard" once,
            by the sample least similar to the old row, the first such on ties; "mean" once, by the mean of its samples.
        found_inf: (1,) any dtype; if not 0 nothing is moved.
        status: (1,) int32, or-ed with ``BAD_TARGET`` if a target lies outside -1 .. C - 1, and then no row is moved,
            and with ``BAD_FEATURE`` if a sample is not finite, and then the rows of such samples are not moved.

    Reads nothing back. A row whose new length is 0 becomes zeros.
    """
    if memory.ndim != 2 or x.ndim != 2 or memory.shape[1] != x.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"{tuple(memory.shape)}, {tuple(x.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"momentum_update_: memory, x, targets must be (C, D), (B, D), (B,), got {shapes}")
    for name, tensor in (("memory", memory), ("x", x)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"momentum_update_: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if rule not in RULES:
        raise ValueError(f"momentum_update_: rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    (b, d), c = x.shape, len(memory)
    if b == 0 or d == 0:
        return
    block_d = triton.next_power_of_2(d)
    with torch.cuda.device_of(memory):  # Triton launches on the current device
        _momentum_update_kernel[(b,)](
            memory, x, targets, targets if found_inf is None else found_inf, targets if status is None else status,
            *memory.stride(), *x.stride(), targets.stride(0),
            b, c, d, momentum, 1 - momentum,
            RULE=RULES[rule], HAS_FOUND_INF=found_inf is not None, HAS_STATUS=status is not None,
            BLOCK_B=256, BLOCK_D=block_d, num_warps=_num_warps(block_d),
        )  # fmt: skip


def _num_warps(block_d: int) -> int:
    """16 numbers of a row in each thread: enough to hide latency, few enough for three rows in registers."""
    return min(max(block_d // 512, 1), 32)

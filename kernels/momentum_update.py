# SPDX-License-Identifier: Apache-2.0
"""Moving the rows of a memory towards a batch, in place and in one launch (Triton).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Methods: Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, equations 2 and 3
(sequential, hard); DCCC, ICASSP 2024 (weighted); BMW, NeurIPS 2025 (push); Ge et al., SpCL, NeurIPS 2020 (row).
Oracle: fastreid_u/reference/momentum_update.py.  Cost: reads x once, reads and writes each touched row once; "push"
also reads the memory once for each touched row, in a launch of its own.

One program per sample; the first sample of a row owns the row and walks the row's samples in batch order, so no two
programs write the same row and nothing is sorted. Where the means of clusters follow, the first sample of a cluster
owns the cluster. The bits of a row depend on D, the row and its own samples only ("push": and on the other row), not
on B, C, the other samples or the order in which programs run.
"""

import torch
import triton
import triton.language as tl

RULES = {"sequential": 0, "row": 0, "hard": 1, "mean": 2, "weighted": 3, "index": 4, "push": 5}
SEQUENTIAL, HARD, MEAN, WEIGHTED, INDEX, PUSH = (tl.constexpr(i) for i in range(6))
BAD_TARGET = 1  # bits of `status`
BAD_FEATURE = 2
EPS = tl.constexpr(1e-12)  # smallest length that divides, as in torch.nn.functional.normalize
NEVER = tl.constexpr(2**31 - 1)
SAMPLES = 256  # targets that a program looks at at a time
BLOCK_C, BLOCK_K = 32, 128  # rows of the memory that a program of the search compares, and columns at a time


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
def _clusters_of(targets_ptr, labels_ptr, stride_t, b, B, C, K):
    """Targets of the samples ``b``, their rows' labels, and a number that tells clusters apart; -1 for no row."""
    target = tl.load(targets_ptr + b.to(tl.int64) * stride_t, mask=b < B, other=-1).to(tl.int64)
    label = tl.load(labels_ptr + target, mask=(target >= 0) & (target < C), other=-1).to(tl.int64)
    own = tl.where(label >= 0, label, K + target)  # a row without a label is a cluster of its own
    return target, label, tl.where(target >= 0, own, -1)


@triton.jit
def _next_row(targets_ptr, labels_ptr, stride_t, cluster, after, B, C, K, BLOCK_B: tl.constexpr):
    """Smallest index above ``after`` that is in ``cluster`` and the first of its row; NEVER if there is none."""
    found = tl.full([], NEVER, tl.int32)
    start = (after + 1) // BLOCK_B * BLOCK_B
    while (start < B) & (found == NEVER):
        b = start + tl.arange(0, BLOCK_B)
        _, _, clusters = _clusters_of(targets_ptr, labels_ptr, stride_t, b, B, C, K)
        candidate = tl.min(tl.where((clusters == cluster) & (b > after), b, NEVER))
        start = tl.where(candidate < NEVER, candidate // BLOCK_B * BLOCK_B, start + BLOCK_B)
        after = tl.where(candidate < NEVER, candidate, after)
        row = tl.load(targets_ptr + candidate.to(tl.int64) * stride_t, mask=candidate < B, other=-1)
        if candidate < NEVER:
            found = tl.where(_next_sample(targets_ptr, stride_t, row, -1, B, BLOCK_B) == candidate, candidate, NEVER)
    return found


@triton.jit
def _unit(v):
    return v / tl.maximum(tl.sqrt(tl.sum(v * v)), EPS)


@triton.jit
def _walk(
    old, row, b, column_ptr, targets_ptr, stride_xb, stride_t, d, B, D, keep, take, inverse_temperature,
    RULE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Sees the samples of ``row`` from sample ``b`` on.

    Returns the moved row, or for HARD and PUSH the chosen sample, for MEAN and WEIGHTED the mean sample; the lowest
    similarity; and 0 where a sample was not finite.
    """
    new = old
    if (RULE != SEQUENTIAL) & (RULE != INDEX):
        new = tl.zeros_like(old)
    lowest = tl.full([], float("inf"), tl.float32)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    finite = tl.full([], 1, tl.int32)
    raw = tl.load(column_ptr + b.to(tl.int64) * stride_xb, mask=d < D, other=0.0)
    while b < B:
        # The next sample is on its way while this one is worked on: the walk is bound by latency.
        b_next = _next_sample(targets_ptr, stride_t, row, b, B, BLOCK_B)
        wanted = tl.where(b_next < B, D, 0)
        raw_next = tl.load(column_ptr + b_next.to(tl.int64) * stride_xb, mask=d < wanted, other=0.0)
        sample = raw.to(tl.float32)
        sq_norm = tl.sum(sample * sample)
        finite = tl.where(sq_norm < float("inf"), finite, 0)  # 0 for NaN too
        if NORMALIZE:
            sample = sample / tl.maximum(tl.sqrt(sq_norm), EPS)
        if (RULE == SEQUENTIAL) | (RULE == INDEX):
            new = _unit(keep * new + take * sample)
        elif (RULE == HARD) | (RULE == PUSH):
            similarity = tl.sum(sample * old)
            closer = similarity < lowest  # strict: the first sample wins a tie
            new = tl.where(closer, sample, new)
            lowest = tl.where(closer, similarity, lowest)
        elif RULE == MEAN:
            new += sample
            total += 1
        else:  # softmax(-similarity / temperature), in one pass: what was summed fades when the maximum rises
            score = -tl.sum(sample * old) * inverse_temperature
            higher = tl.maximum(highest, score)
            fade = tl.exp(highest - higher)
            weight = tl.exp(score - higher)
            new = new * fade + sample * weight
            total = total * fade + weight
            highest = higher
        b = b_next
        raw = raw_next
    if (RULE == MEAN) | (RULE == WEIGHTED):
        new = new / total
    return new, lowest, finite


@triton.jit(do_not_specialize=["B", "C"])
def _nearest_other_kernel(
    memory_ptr,  # [C, D] any float
    targets_ptr,  # [B] int
    found_inf_ptr,  # [1], read if HAS_FOUND_INF
    best_ptr,  # [B, blocks] fp32, written for the first sample of each row: similarity to the nearest other row
    nearest_ptr,  # [B, blocks] int32: that row
    old_ptr,  # [B, D] fp32: the row itself, as it was
    stride_mc, stride_md, stride_t,
    B, C, D,
    HAS_FOUND_INF: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take other samples and the same rows. One axis for both: a second one ends at 65,535 blocks.
    me, block, blocks = tl.program_id(0) % B, tl.program_id(0) // B, tl.cdiv(C, BLOCK_C)
    if HAS_FOUND_INF:  # noqa: SIM102 - this one is decided by the compiler
        if tl.load(found_inf_ptr) != 0:
            return
    row = tl.load(targets_ptr + me.to(tl.int64) * stride_t).to(tl.int64)
    if (row < 0) | (row >= C):
        return
    if _next_sample(targets_ptr, stride_t, row, -1, B, BLOCK_B) != me:
        return
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ptr = memory_ptr + row * stride_mc
    others_ptr = memory_ptr + c.to(tl.int64)[:, None] * stride_mc
    similarity = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        column = d.to(tl.int64) * stride_md
        mine = tl.load(row_ptr + column, mask=d < D, other=0.0).to(tl.float32)
        if block == 0:
            tl.store(old_ptr + me.to(tl.int64) * D + d, mine, mask=d < D)
        others = tl.load(others_ptr + column[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        similarity += tl.sum(others.to(tl.float32) * mine[None, :], axis=1)
    similarity = tl.where((c < C) & (c != row), similarity, float("-inf"))
    best = tl.max(similarity)
    tl.store(best_ptr + me.to(tl.int64) * blocks + block, best)
    tl.store(nearest_ptr + me.to(tl.int64) * blocks + block, tl.min(tl.where(similarity == best, c, NEVER)))


@triton.jit
def _nearest_other_row(
    memory_ptr, targets_ptr, best_ptr, nearest_ptr, old_ptr, stride_mc, stride_md, stride_t, me, d, blocks, B, D,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The nearest other row as it was before this launch, and whether there is one."""
    best = tl.full([], float("-inf"), tl.float32)
    nearest = tl.full([], NEVER, tl.int32)
    for start in range(0, blocks, BLOCK_B):
        i = start + tl.arange(0, BLOCK_B)
        at = me.to(tl.int64) * blocks + i
        similarity = tl.load(best_ptr + at, mask=i < blocks, other=float("-inf"))
        highest = tl.max(similarity)
        row = tl.load(nearest_ptr + at, mask=i < blocks, other=NEVER)
        nearest = tl.where(highest > best, tl.min(tl.where(similarity == highest, row, NEVER)), nearest)
        best = tl.maximum(best, highest)
    found = (best > float("-inf")) & (nearest != NEVER)
    nearest = tl.where(found, nearest, 0)
    owner = _next_sample(targets_ptr, stride_t, nearest, -1, B, BLOCK_B)
    moved = found & (owner < B)  # some other program may have written it already
    saved = tl.load(old_ptr + owner.to(tl.int64) * D + d, mask=d < tl.where(moved, D, 0), other=0.0)
    still = tl.load(
        memory_ptr + nearest.to(tl.int64) * stride_mc + d.to(tl.int64) * stride_md,
        mask=d < tl.where(found & (owner >= B), D, 0), other=0.0,
    )  # fmt: skip
    return tl.where(moved, saved, still.to(tl.float32)), found


@triton.jit(do_not_specialize=["B", "C", "blocks"])
def _momentum_update_kernel(
    memory_ptr,  # [C, D] any float, changed
    x_ptr,  # [B, D] any float
    targets_ptr,  # [B] int
    index_ptr,  # [C] int, read if RULE is INDEX
    best_ptr, nearest_ptr, old_ptr,  # what _nearest_other_kernel wrote, read if RULE is PUSH
    found_inf_ptr,  # [1], read if HAS_FOUND_INF
    status_ptr,  # [1] int32, written if HAS_STATUS
    stride_mc, stride_md, stride_xb, stride_xd, stride_t, stride_i,
    B, C, D, blocks,
    keep, take,  # weights of the old row and of the sample: momentum, 1 - momentum
    inverse_temperature, push,
    RULE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_STATUS: tl.constexpr,
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
    if row < 0:
        return
    if RULE == INDEX:
        if tl.load(index_ptr + row * stride_i) != me:
            return
    elif earlier != 0:
        return

    d = tl.arange(0, BLOCK_D)
    live = d < D
    row_ptr = memory_ptr + row * stride_mc + d.to(tl.int64) * stride_md
    old = tl.load(row_ptr, mask=live, other=0.0).to(tl.float32)
    # One sample only: no sample names row -2, so none follows. A loop that ends by a constant breaks Triton 3.6.
    if RULE == INDEX:
        row = tl.full([], -2, tl.int64)
    new, lowest, finite = _walk(
        old, row, me, x_ptr + d.to(tl.int64) * stride_xd, targets_ptr, stride_xb, stride_t, d, B, D, keep, take,
        inverse_temperature, RULE, NORMALIZE, BLOCK_B,
    )  # fmt: skip
    if RULE == PUSH:
        other, found = _nearest_other_row(
            memory_ptr, targets_ptr, best_ptr, nearest_ptr, old_ptr, stride_mc, stride_md, stride_t, me, d, blocks,
            B, D, BLOCK_B,
        )  # fmt: skip
        shove = tl.where(found, push * (1 + tl.sum(old * other)), 0.0)
        new = _unit(old - take * (1 - lowest) * (old - new) - shove * (old + other))
    elif (RULE != SEQUENTIAL) & (RULE != INDEX):
        new = _unit(keep * old + take * new)
    if finite != 0:
        tl.store(row_ptr, new.to(memory_ptr.dtype.element_ty), mask=live)
    elif HAS_STATUS:
        tl.atomic_or(status_ptr, 2)


@triton.jit(do_not_specialize=["B", "C", "K"])
def _row_update_kernel(
    memory_ptr,  # [C, D] any float, changed
    means_ptr,  # [K, D] any float, changed
    x_ptr,  # [B, D] any float
    targets_ptr,  # [B] int
    labels_ptr,  # [C] int, contiguous
    sizes_ptr,  # [K] int, contiguous
    found_inf_ptr,  # [1], read if HAS_FOUND_INF
    status_ptr,  # [1] int32, written if HAS_STATUS
    stride_mc, stride_md, stride_kc, stride_kd, stride_xb, stride_xd, stride_t,
    B, C, K, D,
    keep, take,
    NORMALIZE: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_STATUS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    me = tl.program_id(0)
    if HAS_FOUND_INF:  # noqa: SIM102 - this one is decided by the compiler
        if tl.load(found_inf_ptr) != 0:
            return

    target, label, cluster = _clusters_of(targets_ptr, labels_ptr, stride_t, me, B, C, K)
    bad = 0
    earlier = 0
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        targets, labels, clusters = _clusters_of(targets_ptr, labels_ptr, stride_t, b, B, C, K)
        wrong = (targets < -1) | (targets >= C) | (labels >= K)
        bad = tl.maximum(bad, tl.max(wrong.to(tl.int32)))
        earlier = tl.maximum(earlier, tl.max(((clusters == cluster) & (b < me)).to(tl.int32)))
    if bad != 0:
        if HAS_STATUS:  # noqa: SIM102
            if me == 0:
                tl.atomic_or(status_ptr, 1)
        return
    if (target < 0) | (earlier != 0):
        return

    d = tl.arange(0, BLOCK_D)
    live = d < D
    column_ptr = x_ptr + d.to(tl.int64) * stride_xd
    labelled = d < tl.where(label >= 0, D, 0)
    mean_ptr = means_ptr + label * stride_kc + d.to(tl.int64) * stride_kd
    mean = tl.load(mean_ptr, mask=labelled, other=0.0).to(tl.float32)
    size = tl.load(sizes_ptr + label, mask=label >= 0, other=1).to(tl.float32)
    first = me
    while first < B:
        row = tl.load(targets_ptr + first.to(tl.int64) * stride_t).to(tl.int64)
        row_ptr = memory_ptr + row * stride_mc + d.to(tl.int64) * stride_md
        old = tl.load(row_ptr, mask=live, other=0.0).to(tl.float32)
        new, _, finite = _walk(
            old, row, first, column_ptr, targets_ptr, stride_xb, stride_t, d, B, D, keep, take, 0.0,
            SEQUENTIAL, NORMALIZE, BLOCK_B,
        )  # fmt: skip
        rounded = new.to(memory_ptr.dtype.element_ty)
        if finite != 0:
            tl.store(row_ptr, rounded, mask=live)
        elif HAS_STATUS:
            tl.atomic_or(status_ptr, 2)
        mean += tl.where(finite != 0, rounded.to(tl.float32) - old, 0.0) / size
        first = _next_row(targets_ptr, labels_ptr, stride_t, cluster, first, B, C, K, BLOCK_B)
    tl.store(mean_ptr, mean.to(means_ptr.dtype.element_ty), mask=labelled)


def momentum_update_(
    memory: torch.Tensor,
    x: torch.Tensor,
    targets: torch.Tensor,
    *,
    momentum: float = 0.1,
    rule: str = "sequential",
    normalize: bool = True,
    weight_temperature: float | None = None,
    push_weight: float = 0.2,
    index: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    cluster_sizes: torch.Tensor | None = None,
    cluster_means: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> None:
    """``row = l2(momentum * row + (1 - momentum) * sample)`` in place, on ``memory``'s device.

    Args:
        memory: (C, D) float32, float16 or bfloat16, any strides; the arithmetic is float32, rounded once at the end.
        x: (B, D), the same choice of dtypes, any strides.
        targets: (B,) integers, the row that each sample moves; -1 moves none.
        momentum: weight of the old row.
        rule: "sequential" and "row" move a row by each of its samples in batch order, normalising after every one;
            "hard" once, by the sample least similar to the old row, the first such on ties; "mean" by the mean of its
            samples, "weighted" by that with weights softmax(-similarity / weight_temperature); "index" by the sample
            ``index[row]``, if that is one of its own; "push" by the one of "hard", weighted by its distance, and away
            from the nearest other row m', weighted by ``push_weight (1 + <row, m'>)``.
        normalize: scale the samples to unit length first.
        weight_temperature: of "weighted", positive. push_weight: of "push". index: of "index", (C,) integers or -1.
        labels, cluster_sizes, cluster_means: of "row", optional, (C,) and (K,) integers and (K, D) floats: the cluster
            of each row or -1, its number of rows, and their mean, which is changed with them.
        found_inf: (1,) any dtype; if not 0 nothing is moved.
        status: (1,) int32, or-ed with ``BAD_TARGET`` if a target lies outside -1 .. C - 1 or a label that it leads to
            outside -1 .. K - 1, and then no row is moved, and with ``BAD_FEATURE`` if a sample is not finite, and then
            the rows of such samples are not moved.

    Reads nothing back. A row whose new length is 0 becomes zeros. "push" takes two launches and 4 B D + B C / 4 bytes.
    """
    if memory.ndim != 2 or x.ndim != 2 or memory.shape[1] != x.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"{tuple(memory.shape)}, {tuple(x.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"momentum_update_: memory, x, targets must be (C, D), (B, D), (B,), got {shapes}")
    for name, tensor in (("memory", memory), ("x", x)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"momentum_update_: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if rule not in RULES:
        raise ValueError(f"momentum_update_: rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    needed = {"weighted": weight_temperature, "index": index}
    if rule in needed and needed[rule] is None:
        raise ValueError(f"momentum_update_: weight_temperature or index must be given, got None and rule={rule!r}")
    (b, d), c = x.shape, len(memory)
    if b == 0 or d == 0:
        return
    block_d = triton.next_power_of_2(d)
    flags = targets if found_inf is None else found_inf, targets if status is None else status
    settings = {
        "NORMALIZE": normalize, "HAS_FOUND_INF": found_inf is not None, "HAS_STATUS": status is not None,
        "BLOCK_B": SAMPLES, "BLOCK_D": block_d, "num_warps": _num_warps(block_d),
    }  # fmt: skip
    with torch.cuda.device_of(memory):  # Triton launches on the current device
        if rule == "row" and cluster_means is not None:
            _row_update_kernel[(b,)](
                memory, cluster_means, x, targets, labels.contiguous(), cluster_sizes.contiguous(), *flags,
                *memory.stride(), *cluster_means.stride(), *x.stride(), targets.stride(0),
                b, c, len(cluster_means), d, momentum, 1 - momentum, **settings,
            )  # fmt: skip
            return
        scratch, blocks = (targets, targets, targets), triton.cdiv(c, BLOCK_C)
        if rule == "push":
            scratch = (
                torch.empty(b, blocks, dtype=torch.float32, device=x.device),
                torch.empty(b, blocks, dtype=torch.int32, device=x.device),
                torch.empty(b, d, dtype=torch.float32, device=x.device),
            )
        if rule == "push" and c > 0:
            _nearest_other_kernel[(b * blocks,)](
                memory, targets, flags[0], *scratch, *memory.stride(), targets.stride(0), b, c, d,
                HAS_FOUND_INF=found_inf is not None, BLOCK_B=SAMPLES, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K, num_warps=4,
            )  # fmt: skip
        _momentum_update_kernel[(b,)](
            memory, x, targets, targets if index is None else index, *scratch, *flags,
            *memory.stride(), *x.stride(), targets.stride(0), 0 if index is None else index.stride(0),
            b, c, d, blocks, momentum, 1 - momentum,
            1 / weight_temperature if rule == "weighted" else 0.0, float(push_weight),
            RULE=RULES[rule], **settings,
        )  # fmt: skip


def _num_warps(block_d: int) -> int:
    """16 numbers of a row in each thread: enough to hide latency, few enough for several rows in registers."""
    return min(max(block_d // 512, 1), 32)

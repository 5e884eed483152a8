# SPDX-License-Identifier: Apache-2.0
"""The forward: logits, the hardest negatives of each sample, and its loss."""

import torch
import triton
import triton.language as tl

from .layout import COEFFICIENT, EPS, INV_COUNT, INV_NORM, LSE, SLOPE, as_rows, number_bytes, roles
from .settings import PRECISIONS, Settings

# samples, proxies, columns of a tile, warps; literals, because autotuning would make bits depend on timing
# and by bytes of a number, the largest that keep within the registers of sm_80, sm_90 and sm_100
FORWARD_TILE = {4: (64, 64, 32, 8), 2: (64, 64, 64, 8)}
SELECT_BLOCK = 1024  # proxies of a row at a time


@triton.jit
def _key(logit):
    """Unsigned integers in the order of the floats; NaN is the largest."""
    bits = logit.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(logit != logit, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit(do_not_specialize=["B", "Q"])
def _proxy_nce_logits_kernel(
    x_ptr,  # [B, D] any float
    memory_ptr,  # [Q, D] any float
    logits_ptr,  # [B, Q] fp32, written
    stats_ptr,  # [5, B] fp32, INV_NORM written
    stride_x, stride_m, stride_l, B, Q, D,
    scale,  # 1 / temperature
    NORMALIZE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take other samples and the same proxies: a tile of the memory comes from DRAM once. One
    # axis for both, since a second one ends at 65,535 tiles.
    tiles_b = tl.cdiv(B, BLOCK_B)
    first_b = tl.program_id(0) % tiles_b * BLOCK_B
    first_q = tl.program_id(0) // tiles_b * BLOCK_Q
    b = first_b + tl.arange(0, BLOCK_B)
    q = first_q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    # Scalar 64-bit bases and 32-bit offsets within a tile: tiles of 64-bit pointers would spill.
    x_ptr += first_b.to(tl.int64) * stride_x
    memory_ptr += first_q.to(tl.int64) * stride_m
    x_offset = tl.arange(0, BLOCK_B)[:, None] * stride_x + d[None, :]
    m_offset = tl.arange(0, BLOCK_Q)[None, :] * stride_m + d[:, None]
    acc = tl.zeros([BLOCK_B, BLOCK_Q], tl.float32)
    squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for k in range(0, D, BLOCK_D):
        live_d = d < D - k
        x = tl.load(x_ptr + k + x_offset, mask=(b < B)[:, None] & live_d[None, :], other=0.0)
        m = tl.load(memory_ptr + k + m_offset, mask=live_d[:, None] & (q < Q)[None, :], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            m = m.to(tl.float32)
        if NORMALIZE:
            squares += x.to(tl.float32) * x.to(tl.float32)
        acc = tl.dot(x, m, acc, input_precision=PRECISION)
    inv_norm = tl.full([BLOCK_B], 1.0, tl.float32)
    if NORMALIZE:
        inv_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), EPS)
    tile = logits_ptr + b.to(tl.int64)[:, None] * stride_l + q[None, :]
    tl.store(tile, acc * (inv_norm * scale)[:, None], mask=(b < B)[:, None] & (q < Q)[None, :])
    if first_q == 0:
        tl.store(stats_ptr + INV_NORM * B + b, inv_norm, mask=b < B)


@triton.jit(do_not_specialize=["B", "Q", "hard_negatives", "ignore_index"])
def _proxy_nce_select_kernel(
    logits_ptr,  # [B, Q] fp32
    clusters_ptr, cameras_ptr,  # [B] int
    proxy_clusters_ptr, proxy_cameras_ptr,  # [Q] int
    loss_ptr,  # [B] fp32, written: the share of each sample in the loss
    stats_ptr,  # [5, B] fp32, all but INV_NORM written
    chosen_ptr,  # [B, hard_negatives] int32, written if HARD
    counts_ptr,  # [2, B] int32, written if HARD: negatives chosen, index from which positives count twice
    status_ptr,  # [1] int32, written if HAS_STATUS
    stride_l, B, Q, hard_negatives, ignore_index,
    HARD: tl.constexpr, COMPAT: tl.constexpr, SCOPE: tl.constexpr, POSITIVES: tl.constexpr, REDUCTION: tl.constexpr,
    HAS_STATUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    cluster = tl.load(clusters_ptr + b)
    camera = tl.load(cameras_ptr + b)
    logits_ptr += b.to(tl.int64) * stride_l
    i = tl.arange(0, BLOCK)

    # The k-th largest negative: its key from the highest digit down, and how many of its equals are wanted.
    threshold = tl.zeros([], tl.uint32)
    wanted = Q
    positives = 0
    missing = 0
    if HARD:
        bins = tl.arange(0, 256)
        wanted = hard_negatives
        negatives = 0
        for digit in range(4):
            shift = tl.full([], 24, tl.uint32) - 8 * digit
            histogram = tl.zeros([256], tl.int32)
            for start in range(0, Q, BLOCK):
                q = start + i
                _, positive, negative = roles(
                    cluster, camera, proxy_clusters_ptr, proxy_cameras_ptr, q, q < Q, SCOPE, POSITIVES
                )
                key = _key(tl.load(logits_ptr + q, mask=q < Q, other=0.0))
                if digit == 0:
                    positives += tl.sum(positive.to(tl.int32))
                    negatives += tl.sum(negative.to(tl.int32))
                negative = negative & ((key >> shift >> 8) == (threshold >> shift >> 8))  # same higher digits
                histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=negative)
            from_here_up = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram
            edge = tl.max(tl.where(from_here_up >= wanted, bins, 0))
            wanted -= tl.sum(tl.where(bins > edge, histogram, 0))
            threshold = threshold | (edge.to(tl.uint32) << shift)
        if negatives <= hard_negatives:
            threshold = tl.zeros([], tl.uint32)
            wanted = Q
        missing = tl.maximum(hard_negatives - negatives, 0)

    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    weighted = tl.zeros([], tl.float32)
    positive_sum = tl.zeros([], tl.float32)
    same_count = 0
    positive_count = 0
    tie_count = 0
    chosen_count = 0
    twice_from = Q
    for start in range(0, Q, BLOCK):
        q = start + i
        same, positive, negative = roles(
            cluster, camera, proxy_clusters_ptr, proxy_cameras_ptr, q, q < Q, SCOPE, POSITIVES
        )
        logits = tl.load(logits_ptr + q, mask=q < Q, other=0.0)
        times = positive.to(tl.int32)
        if HARD:
            key = _key(logits)
            tie = (negative & (key == threshold)).to(tl.int32)
            in_time = tie_count + tl.cumsum(tie, 0) <= wanted  # of equals the first by index
            negative = negative & ((key > threshold) | ((tie != 0) & in_time))
            tie_count += tl.sum(tie)
            slot = chosen_count + tl.cumsum(negative.to(tl.int32), 0) - 1
            tl.store(chosen_ptr + b.to(tl.int64) * hard_negatives + slot, q, mask=negative)
            chosen_count += tl.sum(negative.to(tl.int32))
            if COMPAT:
                rank = positive_count + tl.cumsum(times, 0)  # from 1
                twice = positive & (rank > positives - missing)
                twice_from = tl.minimum(twice_from, tl.min(tl.where(twice, q, Q)))
                times += twice.to(tl.int32)
        positive_count += tl.sum(positive.to(tl.int32))
        same_count += tl.sum(same.to(tl.int32))
        positive_sum += tl.sum(tl.where(positive, logits, 0.0))
        times += negative.to(tl.int32)
        top = tl.maximum(highest, tl.max(tl.where(times > 0, logits, float("-inf"))))
        shift_by = tl.where(top == float("-inf"), 0.0, top)
        e = tl.exp(tl.where(times > 0, logits, float("-inf")) - shift_by) * times
        rescale = tl.exp(highest - shift_by)
        total = total * rescale + tl.sum(e)
        weighted = weighted * rescale + tl.sum(tl.where(times > 0, e * logits, 0.0))
        highest = top

    # This sample's share: one over how many of the batch it is averaged with.
    kept = cluster != ignore_index
    takes_part = kept & (positive_count > 0)
    coefficient = tl.where(takes_part, 1.0, 0.0)
    if REDUCTION == "mean" or REDUCTION == "camera":
        averaged = 0
        for start in range(0, B, 256):
            j = start + tl.arange(0, 256)
            other = (j < B) & (tl.load(clusters_ptr + j, mask=j < B, other=0) != ignore_index)
            if REDUCTION == "camera":
                other = other & (tl.load(cameras_ptr + j, mask=j < B, other=0) == camera)
            averaged += tl.sum(other.to(tl.int32))
        coefficient /= tl.maximum(averaged, 1)
    mean_positive = positive_sum / tl.maximum(positive_count, 1)
    total = tl.where(takes_part, total, 1.0)
    lse = highest + tl.log(total)
    loss = tl.where(takes_part, (lse - mean_positive) * coefficient, 0.0)
    tl.store(loss_ptr + b, tl.where(kept & (same_count == 0), float("nan"), loss))
    tl.store(stats_ptr + LSE * B + b, tl.where(takes_part, lse, 0.0))
    tl.store(stats_ptr + SLOPE * B + b, tl.where(takes_part, weighted / total - mean_positive, 0.0))
    tl.store(stats_ptr + COEFFICIENT * B + b, coefficient)
    tl.store(stats_ptr + INV_COUNT * B + b, 1.0 / tl.maximum(positive_count, 1))
    if HARD:
        tl.store(counts_ptr + b, chosen_count)
        tl.store(counts_ptr + B + b, twice_from)
    if HAS_STATUS:  # noqa: SIM102 - this one is decided by the compiler
        if kept & (same_count == 0):
            tl.atomic_or(status_ptr, 4)


def proxy_nce_fwd(
    x: torch.Tensor,
    clusters: torch.Tensor,
    cameras: torch.Tensor,
    memory: torch.Tensor,
    proxy_clusters: torch.Tensor,
    proxy_cameras: torch.Tensor,
    settings: Settings,
    *,
    status: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and what ``proxy_nce_bwd`` needs: logits (B, Q), stats (5, B), chosen (B, k) and counts (2, B) int32.

    k is 0 where all negatives count. Two launches and torch's sum over the batch. Arguments as in ``proxy_nce``.
    """
    (b, d), n, s = x.shape, len(memory), settings
    k = 0 if s.hard_negatives is None or s.scope == "camera" else min(s.hard_negatives, n)
    loss = torch.empty(b, dtype=torch.float32, device=x.device)
    logits = torch.empty(b, n, dtype=torch.float32, device=x.device)
    stats = torch.empty(5, b, dtype=torch.float32, device=x.device)
    chosen = torch.empty(b, k, dtype=torch.int32, device=x.device)
    counts = torch.empty(2, b, dtype=torch.int32, device=x.device)
    if b > 0:
        x, memory = as_rows(x), as_rows(memory)
        ids = [each.contiguous() for each in (clusters, cameras, proxy_clusters, proxy_cameras)]
        block_b, block_q, block_d, warps = FORWARD_TILE[number_bytes(x, memory)]
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _proxy_nce_logits_kernel[(triton.cdiv(b, block_b) * triton.cdiv(n, block_q),)](
                x, memory, logits, stats, x.stride(0), memory.stride(0), logits.stride(0), b, n, d, 1 / s.temperature,
                NORMALIZE=s.normalize, UPCAST=_upcast(x, memory), PRECISION=PRECISIONS[s.precision],
                BLOCK_B=block_b, BLOCK_Q=block_q, BLOCK_D=block_d, num_warps=warps,
            )  # fmt: skip
            _proxy_nce_select_kernel[(b,)](
                logits, *ids, loss, stats, chosen, counts, counts if status is None else status,
                logits.stride(0), b, n, k, s.ignore_index,
                HARD=k > 0, COMPAT=s.compat, SCOPE=s.scope, POSITIVES=s.positives, REDUCTION=s.reduction,
                HAS_STATUS=status is not None, BLOCK=SELECT_BLOCK, num_warps=8,
            )  # fmt: skip
    return loss if s.reduction == "none" else loss.sum(), logits, stats, chosen, counts


def _upcast(x: torch.Tensor, memory: torch.Tensor) -> bool:
    """Two dtypes meet in float32; so does bfloat16 on a CPU, where Triton's interpreter multiplies it wrongly."""
    return x.dtype != memory.dtype or (x.dtype == torch.bfloat16 and x.device.type == "cpu")

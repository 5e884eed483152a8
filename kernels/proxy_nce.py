# SPDX-License-Identifier: Apache-2.0
"""Softmax contrastive loss over camera-aware proxies and their hardest negatives, forward and backward (Triton).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Method: Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification", AAAI 2021.
Oracle: fastreid_u/reference/proxy_nce.py.  Cost: 2 B Q D multiply-adds forward; backward reads |P| + k rows a sample.

The logits l = l2(x) @ memory.T / T are written once. One program a sample then reads its row: it finds the k-th largest
negative digit by digit (four histograms of 256 bins over the bits, which order floats once the sign is undone), the
log-sum-exp over positives and chosen negatives, and a list of the chosen. With P the positives and p the softmax

    d loss / d x = (sum_j c_j memory_j / T - x̂ slope) / |x|,   c_j = p_j - [j in P] / |P|,   slope = sum_j c_j l_j

x̂ = x / |x|; the slope is the part along x̂, which the normalisation removes. The backward gathers the few rows whose c
is not 0. Where all negatives count there is no list: it multiplies by the whole memory, making c again from the logits.

Nothing is accumulated by atomics and no tile depends on the device: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

BAD_CLUSTER = 4  # bit of `status`
EPS = tl.constexpr(1e-12)  # smallest length that divides, as in torch.nn.functional.normalize
NEVER = tl.constexpr(2**31 - 1)
# rows of `stats`, (5, B) float32: what the forward leaves for the backward
LSE, SLOPE, INV_NORM, COEFFICIENT, INV_COUNT = (tl.constexpr(i) for i in range(5))


@triton.jit
def _roles(cluster, camera, clusters_ptr, cameras_ptr, q, live, SCOPE: tl.constexpr, POSITIVES: tl.constexpr):
    """For samples against proxies ``q``: same cluster (in reach), positive, negative."""
    same = tl.load(clusters_ptr + q, mask=live, other=0) == cluster
    reach = live
    positive = same & live
    if SCOPE == "camera":
        reach = live & (tl.load(cameras_ptr + q, mask=live, other=0) == camera)
        positive = same & reach
    elif POSITIVES == "other_cameras":
        positive = positive & (tl.load(cameras_ptr + q, mask=live, other=0) != camera)
    return same & reach, positive, (same == 0) & reach


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
                _, positive, negative = _roles(
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
        same, positive, negative = _roles(
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
        _, positive, _ = _roles(cluster, camera, proxy_clusters_ptr, proxy_cameras_ptr, q, q < Q, "all", POSITIVES)
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
        _, positive, negative = _roles(
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


# samples, proxies, columns of a tile, warps; literals, because autotuning would make bits depend on timing
# and by bytes of a number, the largest that keep within the registers of sm_80, sm_90 and sm_100
FORWARD_TILE = {4: (64, 64, 32, 8), 2: (64, 64, 64, 8)}
BACKWARD_TILE = {4: (64, 32, 64, 8), 2: (64, 16, 64, 8)}
GATHER_TILE = (8, 512, 1024, 4)  # rows of the memory at a time, proxies looked at for positives, columns, warps
SELECT_BLOCK = 1024  # proxies of a row at a time
PRECISIONS = {"fp32": "tf32x3", "tf32": "tf32"}  # tf32x3: three products of rounded halves, as accurate as float32
SCOPES, POSITIVES, REDUCTIONS = ("all", "camera"), ("all", "other_cameras"), ("mean", "camera", "sum", "none")


def proxy_nce_fwd(
    x: torch.Tensor,
    clusters: torch.Tensor,
    cameras: torch.Tensor,
    memory: torch.Tensor,
    proxy_clusters: torch.Tensor,
    proxy_cameras: torch.Tensor,
    *,
    temperature: float = 0.07,
    hard_negatives: int | None = 50,
    scope: str = "all",
    positives: str = "all",
    normalize: bool = True,
    ignore_index: int = -1,
    reduction: str = "mean",
    compat: bool = False,
    precision: str = "fp32",
    status: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and what ``proxy_nce_bwd`` needs: logits (B, Q), stats (5, B), chosen (B, k) and counts (2, B) int32.

    k is 0 where all negatives count. Two launches and torch's sum over the batch. Arguments as in ``proxy_nce``.
    """
    (b, d), n = x.shape, len(memory)
    k = 0 if hard_negatives is None or scope == "camera" else min(hard_negatives, n)
    loss = torch.empty(b, dtype=torch.float32, device=x.device)
    logits = torch.empty(b, n, dtype=torch.float32, device=x.device)
    stats = torch.empty(5, b, dtype=torch.float32, device=x.device)
    chosen = torch.empty(b, k, dtype=torch.int32, device=x.device)
    counts = torch.empty(2, b, dtype=torch.int32, device=x.device)
    if b > 0:
        x, memory = _rows(x), _rows(memory)
        ids = [each.contiguous() for each in (clusters, cameras, proxy_clusters, proxy_cameras)]
        block_b, block_q, block_d, warps = FORWARD_TILE[_number_bytes(x, memory)]
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _proxy_nce_logits_kernel[(triton.cdiv(b, block_b) * triton.cdiv(n, block_q),)](
                x, memory, logits, stats, x.stride(0), memory.stride(0), logits.stride(0), b, n, d, 1 / temperature,
                NORMALIZE=normalize, UPCAST=_upcast(x, memory), PRECISION=PRECISIONS[precision],
                BLOCK_B=block_b, BLOCK_Q=block_q, BLOCK_D=block_d, num_warps=warps,
            )  # fmt: skip
            _proxy_nce_select_kernel[(b,)](
                logits, *ids, loss, stats, chosen, counts, counts if status is None else status,
                logits.stride(0), b, n, k, ignore_index,
                HARD=k > 0, COMPAT=compat, SCOPE=scope, POSITIVES=positives, REDUCTION=reduction,
                HAS_STATUS=status is not None, BLOCK=SELECT_BLOCK, num_warps=8,
            )  # fmt: skip
    return loss if reduction == "none" else loss.sum(), logits, stats, chosen, counts


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
    *,
    temperature: float = 0.07,
    scope: str = "all",
    positives: str = "all",
    normalize: bool = True,
    precision: str = "fp32",
) -> torch.Tensor:
    """The gradient to ``x`` in its dtype, given ``grad``, that of the loss. One launch, or two without a list."""
    (b, d), n = x.shape, len(memory)
    grad_x = torch.empty(b, d, dtype=x.dtype, device=x.device)
    if b == 0:
        return grad_x
    x, memory = _rows(x), _rows(memory)
    ids = [each.contiguous() for each in (clusters, cameras, proxy_clusters, proxy_cameras)]
    scale, stride_g = 1 / temperature, grad.stride(0) if grad.ndim else 0
    strides = logits.stride(0), memory.stride(0), x.stride(0), stride_g
    with torch.cuda.device_of(x):
        if chosen.shape[1] > 0:
            rows, block, block_d, warps = GATHER_TILE
            block_d = min(block_d, triton.next_power_of_2(d))
            _proxy_nce_gather_kernel[(b, triton.cdiv(d, block_d))](
                logits, memory, x, stats, chosen, counts, *ids, grad, grad_x,
                *strides, b, n, d, chosen.shape[1], scale,
                NORMALIZE=normalize, POSITIVES=positives, ROWS=rows, BLOCK=block, BLOCK_D=block_d, num_warps=warps,
            )  # fmt: skip
            return grad_x
        block_b, block_q, block_d, warps = BACKWARD_TILE[_number_bytes(x, memory)]
        grid = triton.cdiv(b, block_b), triton.cdiv(d, block_d)
        splits = min(triton.cdiv(96, grid[0] * grid[1]), triton.cdiv(n, 8 * block_q))
        tiles = triton.cdiv(triton.cdiv(n, block_q), splits)
        partial = x if splits == 1 else torch.empty(splits, b, d, dtype=torch.float32, device=x.device)
        _proxy_nce_grad_x_kernel[(*grid, splits)](
            logits, memory, x, stats, *ids, grad, partial, grad_x, *strides, b, n, d, scale, tiles,
            NORMALIZE=normalize, SCOPE=scope, POSITIVES=positives, FINISH=splits == 1, PRECISION=PRECISIONS[precision],
            BLOCK_B=block_b, BLOCK_Q=block_q, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _proxy_nce_finish_kernel[(triton.cdiv(b, 8), grid[1])](
                partial, x, stats, grad, grad_x, x.stride(0), stride_g, b, d, scale, splits,
                NORMALIZE=normalize, BLOCK_B=8, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
    return grad_x


class _ProxyNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, memory, forward_only, both):
        clusters, cameras, proxy_clusters, proxy_cameras = ids
        given = x, clusters, cameras, memory, proxy_clusters, proxy_cameras
        loss, *left = proxy_nce_fwd(*given, **forward_only, **both)
        ctx.save_for_backward(*given, *left)
        ctx.both = both
        return loss

    @staticmethod
    def backward(ctx, grad):
        return proxy_nce_bwd(grad, *ctx.saved_tensors, **ctx.both), None, None, None, None


def proxy_nce(
    x: torch.Tensor,
    clusters: torch.Tensor,
    cameras: torch.Tensor,
    memory: torch.Tensor,
    proxy_clusters: torch.Tensor,
    proxy_cameras: torch.Tensor,
    *,
    temperature: float = 0.07,
    hard_negatives: int | None = 50,
    scope: str = "all",
    positives: str = "all",
    normalize: bool = True,
    ignore_index: int = -1,
    reduction: str = "mean",
    compat: bool = False,
    precision: str = "fp32",
    status: torch.Tensor | None = None,
) -> torch.Tensor:
    """``-mean over P of log softmax(l2(x) @ memory.T / temperature)``, the softmax over P and H; gradient to ``x``.

    P: the proxies of a sample's cluster. H: the ``hard_negatives`` most similar of the others; of equals at the edge
    the first by index. With scope "camera" a sample sees the proxies of its own camera only, all of them.

    Args:
        x: (B, D) float32, float16 or bfloat16, normalised here unless ``normalize`` is False.
        clusters: (B,) integers, or ``ignore_index``. One without a proxy makes the loss NaN.
        cameras: (B,) integers.
        memory: (Q, D), the same choice of dtypes, Q >= 1; no gradient flows to it.
        proxy_clusters, proxy_cameras: (Q,) integers.
        hard_negatives: how many; None takes all. The backward reads that many rows of the memory for each sample.
        scope: "all" or "camera".
        positives: "all", or "other_cameras" to leave out the proxy of the sample's own camera.
        reduction: "mean" over the samples that take part, "camera" (over cameras the sum of means), "sum" or "none".
        compat: fill up an H that is too short with the last positives by index.
        precision: "fp32" (split products on tensor cores) or "tf32".
        status: (1,) int32, or-ed with ``BAD_CLUSTER`` if a sample has no proxy to go to.

    Returns the float32 loss. Memory beyond inputs and gradients: 4 B Q + 4 B hard_negatives bytes.
    """
    shapes = x.shape[:1], x.shape[:1], memory.shape[:1], memory.shape[:1]
    ids = clusters, cameras, proxy_clusters, proxy_cameras
    if memory.ndim != 2 or x.ndim != 2 or memory.shape[1] != x.shape[1] or tuple(i.shape for i in ids) != shapes:
        got = ", ".join(str(tuple(each.shape)) for each in (x, memory, *ids))
        raise ValueError(f"proxy_nce: x, memory and ids must be (B, D), (Q, D), twice (B,), twice (Q,), got {got}")
    if len(memory) == 0:
        raise ValueError(f"proxy_nce: memory must have at least one row, got shape {tuple(memory.shape)}")
    for name, tensor in (("x", x), ("memory", memory)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"proxy_nce: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    for name, value, choices in (
        ("scope", scope, SCOPES),
        ("positives", positives, POSITIVES),
        ("reduction", reduction, REDUCTIONS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in choices:
            raise ValueError(f"proxy_nce: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    both = {"temperature": temperature, "scope": scope, "positives": positives, "normalize": normalize}
    forward_only = {"hard_negatives": hard_negatives, "ignore_index": ignore_index, "reduction": reduction}
    forward_only |= {"compat": compat, "status": status}
    return _ProxyNCE.apply(x, ids, memory, forward_only, both | {"precision": precision})


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels step along a row by one."""
    return x if x.stride(1) == 1 else x.contiguous()


def _number_bytes(x: torch.Tensor, memory: torch.Tensor) -> int:
    return max(x.element_size(), memory.element_size())


def _upcast(x: torch.Tensor, memory: torch.Tensor) -> bool:
    """Two dtypes meet in float32; so does bfloat16 on a CPU, where Triton's interpreter multiplies it wrongly."""
    return x.dtype != memory.dtype or (x.dtype == torch.bfloat16 and x.device.type == "cpu")

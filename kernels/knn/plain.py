# SPDX-License-Identifier: Apache-2.0
"""The plain search: the product of whole rows by tensor cores, filtered by proven bounds.

With c = x - mean, ranking by distance is ranking by s_ij = c_i.c_j - |c_j|^2 / 2. The product of the centred rows,
scaled by a power of two and rounded to float16 (as accurate as tf32 at twice its rate), gives s up to a bound that
holds for every pair: |error| <= beta r_i r_j + zeta r_j^2, where r is the length of c, beta counts the rounding of both
inputs and D additions, zeta the rest. Each row keeps what can still be among its first k: the k-th largest lower bound
seen so far is a threshold, and a candidate whose upper bound reaches it is appended to the buffer. So the buffer is
complete whatever the data are, unless it overflows.

Gallery rows are visited in a golden-ratio stride, which spreads any order of the data set evenly, and in rounds that
grow so that a buffer of 16 k entries does not fill: one pass over the gallery, log(M) rounds.

Cost: 2 N M D on float16 tensor cores bounds the time; scores pass once through a buffer of 32 MB, sized to stay in the
L2 of a large GPU; about 40 rows per row are measured. Memory: 2 M D bytes for the float16 gallery, and 300 MB of blocks
at k = 30 and D = 2048.
"""

import torch
import triton
import triton.language as tl

from .measure import nearest

_ROWS = 8192  # queries that share one pass over the gallery
_TILE = (1024, 8192)  # of scores: 32 MB of float32
_ENTRIES = 1 << 22  # of float64 temporaries while rows are centred


@triton.jit(do_not_specialize=["rows", "columns", "first_place"])
def _filter_kernel(
    score_ptr,  # [rows, columns] fp32, products of the centred rows
    reach_ptr,  # [rows] fp32, r_i
    slack_ptr,  # [columns] fp32, beta r_j
    lift_ptr,  # [columns] fp32, zeta r_j^2 - |c_j|^2 / 2
    threshold_ptr,  # [rows] fp32
    count_ptr,  # [rows] int32, entries appended so far, those past CAP included
    upper_ptr,  # [rows, CAP] fp32 out, upper bound of s
    place_ptr,  # [rows, CAP] int32 out, place in the order of visit
    rows,
    columns,
    first_place,  # of this tile
    CAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    score = tl.load(score_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    reach = tl.load(reach_ptr + row, mask=row < rows, other=0.0)
    threshold = tl.load(threshold_ptr + row, mask=row < rows, other=float("inf"))
    slack = tl.load(slack_ptr + column, mask=column < columns, other=0.0)
    lift = tl.load(lift_ptr + column, mask=column < columns, other=0.0)
    upper = score + (reach[:, None] * slack[None, :] + lift[None, :])
    hit = inside & (upper >= threshold[:, None])
    found = tl.sum(hit.to(tl.int32), axis=1)
    # Who comes first in the buffer is a race; what is in it is not, nor anything that is computed from it.
    base = tl.atomic_add(count_ptr + row, found, mask=found > 0, sem="relaxed")
    slot = base[:, None] + tl.cumsum(hit.to(tl.int32), axis=1) - 1
    out = row.to(tl.int64)[:, None] * CAP + slot
    place = first_place + column[None, :] + tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    tl.store(upper_ptr + out, upper, mask=hit & (slot < CAP))
    tl.store(place_ptr + out, place, mask=hit & (slot < CAP))


@triton.jit
def _tighten_kernel(
    upper_ptr,  # [rows, CAP] fp32
    place_ptr,  # [rows, CAP] int32
    reach_ptr,  # [rows] fp32
    slack_ptr,  # [M] fp32
    threshold_ptr,  # [rows] fp32 out
    count_ptr,  # [rows] int32, in and out; CAP + 1 marks a row that overflowed, for good
    out_upper_ptr,  # [rows, CAP] fp32 out
    out_place_ptr,  # [rows, CAP] int32 out
    K,
    curve,
    rounding,  # share of r_i^2 by which two float32 distances may be equal and not the same
    CAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    if count > CAP:
        tl.store(count_ptr + row, CAP + 1)
        tl.store(threshold_ptr + row, float("inf"))
    else:
        reach = tl.load(reach_ptr + row)
        t = tl.arange(0, CAP)
        upper = tl.load(upper_ptr + row * CAP + t, mask=t < count, other=float("-inf"))
        place = tl.load(place_ptr + row * CAP + t, mask=t < count, other=0)
        slack = tl.load(slack_ptr + place, mask=t < count, other=0.0)
        lower = upper - 2.0 * (reach * slack + curve * slack * slack)
        rank = tl.zeros([CAP], tl.int32)
        for start in range(0, count, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            e_upper = tl.load(upper_ptr + row * CAP + e, mask=e < count, other=float("-inf"))
            e_place = tl.load(place_ptr + row * CAP + e, mask=e < count, other=0)
            e_slack = tl.load(slack_ptr + e_place, mask=e < count, other=0.0)
            e_lower = e_upper - 2.0 * (reach * e_slack + curve * e_slack * e_slack)
            ahead = (e_lower[:, None] > lower[None, :]) | (
                (e_lower[:, None] == lower[None, :]) & (e[:, None] < t[None, :])
            )
            rank += tl.sum(ahead.to(tl.int32), axis=0)
        kth = tl.max(tl.where((t < count) & (rank == K - 1), lower, float("-inf")), 0)
        threshold = kth - rounding * reach * reach
        kept = (t < count) & (upper >= threshold)
        slot = row * CAP + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out_upper_ptr + slot, upper, mask=kept)
        tl.store(out_place_ptr + slot, place, mask=kept)
        tl.store(count_ptr + row, tl.sum(kept.to(tl.int32), 0))
        tl.store(threshold_ptr + row, threshold)


def search(
    x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor | None, alone: bool, sq_dist: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Writes the nearest rows of ``rows`` of ``x``, or of all; those that it returns had too many candidates."""
    mine = x if rows is None else x[rows]
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    k = index.shape[1]
    find = _Search(mine, y, k)
    open_rows = torch.empty(len(rows), dtype=torch.bool, device=x.device)
    for first in range(0, len(rows), _ROWS):
        part = slice(first, first + _ROWS)
        place, count = find.candidates(mine[part])
        # fewer than k: products past the range of float32
        open_rows[part] = failed = (count > find.cap) | (count < k)
        count.masked_fill_(failed, 0)
        candidate = find.order[place.long().clamp_(0, len(y) - 1)].int()  # slots past ``count`` hold anything
        nearest(x, y, rows[part], candidate, count, alone, sq_dist, index)
    return rows[open_rows]


class _Search:
    """The gallery as the filter reads it, and the constants of its bounds."""

    def __init__(self, x, y, k):
        (m, dim), device = y.shape, y.device
        self.k = k
        self.cap = triton.next_power_of_2(max(64, 16 * k))
        self.block_e = max(1, min(32, 16384 // self.cap))
        self.order = torch.arange(m, device=device) * _golden_stride(m) % m

        self.mean = y.mean(dim=0, dtype=torch.float64).float()
        ends = (end for part in (x, y) for end in torch.aminmax(part, dim=0))
        largest = max(float((end.double() - self.mean).abs().max()) for end in ends)
        exponent = int(torch.tensor(largest, dtype=torch.float64, device="cpu").frexp().exponent)
        # Entries up to 2**14 leave float16 exact to 2**-11 over 28 binary orders; powers of two change no other bit.
        self.scale = 2.0 ** max(-100, min(100, 14 - exponent))
        self.width = triton.cdiv(dim, 8) * 8  # rows of 16 bytes, as tensor cores want them
        self.tiny = 2.0**-14 * dim**0.5  # lifts r so that beta covers entries below float16's normal range too

        # Both inputs rounded to 2**-11, their product, D additions that may truncate, and what float32 does after them.
        beta = 2.0**-10 + 2.0**-22 + (dim + 64) * 2.0**-22
        zeta = 2.0**-20
        self.curve = zeta / beta**2
        self.rounding = 2.0**-19
        self.gallery = torch.zeros(m, self.width, dtype=torch.float16, device=device)
        self.slack = torch.empty(m, dtype=torch.float32, device=device)
        self.lift = torch.empty(m, dtype=torch.float32, device=device)
        self.score = torch.empty(min(len(x), _TILE[0]) * min(m, _TILE[1]), dtype=torch.float32, device=device)
        step = max(1, _ENTRIES // dim)
        for first in range(0, m, step):
            part = slice(first, first + step)
            self.gallery[part, :dim], length = self._centred(y[self.order[part]])
            self.slack[part] = (beta * (length + self.tiny)).float()
            self.lift[part] = (zeta * (length + self.tiny) ** 2 - length**2 / 2).float()

    def _centred(self, x):
        c = (x - self.mean) * self.scale
        return c, torch.linalg.vector_norm(c, dim=1, dtype=torch.float64)

    def _rounds(self, m):
        """Ends of the stretches of the gallery: each ``grow`` times what has been seen, so that no buffer fills.

        With a fair order a row appends k * grow entries a round, with the deviation of a negative binomial; six of
        these are left free.
        """
        k, grow = self.k, 1.0
        while k * (1 + grow) + 6 * (k * grow * (grow + 1)) ** 0.5 <= self.cap:
            grow += 0.25
        end = min(m, self.cap)  # without a threshold everything is appended
        yield end
        while end < m:
            end = min(m, end + max(1, int(end * (grow - 0.25))))
            yield end

    def candidates(self, x):
        """Places in the order of visit of whatever can be among the first k, (rows, cap), and their counts (rows,)."""
        rows, device = len(x), x.device
        query = torch.zeros(rows, self.width, dtype=torch.float16, device=device)
        reach = torch.empty(rows, dtype=torch.float32, device=device)
        step = max(1, _ENTRIES // x.shape[1])
        for first in range(0, rows, step):
            part = slice(first, first + step)
            query[part, : x.shape[1]], length = self._centred(x[part])
            reach[part] = (length + self.tiny).float()
        threshold = torch.full((rows,), float("-inf"), dtype=torch.float32, device=device)
        count = torch.zeros(rows, dtype=torch.int32, device=device)
        upper, spare_upper = (torch.empty(rows, self.cap, dtype=torch.float32, device=device) for _ in range(2))
        place, spare_place = (torch.zeros(rows, self.cap, dtype=torch.int32, device=device) for _ in range(2))
        start = 0
        for end in self._rounds(len(self.gallery)):
            for left in range(start, end, _TILE[1]):
                right = min(end, left + _TILE[1])
                for top in range(0, rows, _TILE[0]):
                    part = slice(top, min(rows, top + _TILE[0]))
                    height, breadth = part.stop - top, right - left
                    score = self.score[: height * breadth].view(height, breadth)
                    _product(query[part], self.gallery[left:right], score)
                    _filter_kernel[(triton.cdiv(height, 8), triton.cdiv(breadth, 512))](
                        score, reach[part], self.slack[left:right], self.lift[left:right], threshold[part], count[part],
                        upper[part], place[part], height, breadth, left,
                        CAP=self.cap, BLOCK_R=8, BLOCK_C=512, num_warps=4,
                    )  # fmt: skip
            _tighten_kernel[(rows,)](
                upper, place, reach, self.slack, threshold, count, spare_upper, spare_place,
                self.k, self.curve, self.rounding, CAP=self.cap, BLOCK_E=self.block_e,
                enable_fp_fusion=False,  # the kernel makes each lower bound twice and needs the same bits
            )  # fmt: skip
            upper, spare_upper, place, spare_place = spare_upper, upper, spare_place, place
            start = end
        return place, count


def _golden_stride(m):
    """A step near 0.618 m without common divisor with m: multiples of it visit 0 .. m - 1, each once, well spread."""
    stride = max(1, round(0.6180339887498949 * m))
    while True:
        a, b = stride, m
        while b:
            a, b = b, a % b
        if a == 1:
            return stride
        stride += 1


def _product(a, b, out):
    """``out`` = a b^T of float16 rows, added in float32."""
    if a.is_cuda:
        torch.mm(a, b.T, out_dtype=torch.float32, out=out)
    else:  # interpreted: a CPU has no such product, but those of float16 numbers are exact in float32
        torch.mm(a.float(), b.float().T, out=out)

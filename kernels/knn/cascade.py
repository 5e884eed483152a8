# SPDX-License-Identifier: Apache-2.0
"""The cascade: a hint or a guess gives each row a limit, short rows name all that can be within it, float64 decides.

A hint is any list of rows of the gallery, last epoch's neighbours say. The k-th of its distances, measured, is no less
than that of the k-th neighbour, whatever the hint is. Without one, the best of each of some thousand bins of the
gallery by the first columns of the short rows are a guess, of which a few more than k are measured.

Products of short rows meet their threshold where they are made: a bit a pair leaves the chip, not a score. So a tile of
128 x 128 keeps within its registers, and no race decides where a candidate stands.
"""

import torch
import triton
import triton.language as tl

from .measure import distances, nearest
from .short_rows import ShortRows

_ROWS = 8192  # queries that share one pass over the gallery
_STRETCH = 1 << 17  # rows of the gallery whose bits are kept at a time: 128 MB
_BINS = 1024
GUESSED = 64  # columns


@triton.jit(do_not_specialize=["rows", "m"])
def _guess_kernel(
    query_ptr,  # [rows, WIDTH] fp16
    gallery_ptr,  # [M, WIDTH] fp16
    lift_ptr,  # [M] fp32
    best_ptr,  # [rows, strips, BLOCK_C] fp32 out, the largest score of a bin
    place_ptr,  # [rows, strips, BLOCK_C] int32 out, whose it is; -1 in a bin without rows
    rows,
    m,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # of them that are read
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    strip, strips = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d, c = tl.arange(0, COLUMNS), tl.arange(0, BLOCK_C)
    query = tl.load(query_ptr + row[:, None] * WIDTH + d[None, :], mask=(row < rows)[:, None], other=0.0)
    best = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
    place = tl.full([BLOCK_R, BLOCK_C], -1, tl.int32)
    # neighbours in the order of the gallery, which may be sorted by identity, go to different bins
    for start in range(strip * BLOCK_C, m, strips * BLOCK_C):
        column = start + c
        at = column.to(tl.int64)[None, :] * WIDTH + d[:, None]
        theirs = tl.load(gallery_ptr + at, mask=(column < m)[None, :], other=0.0)
        lift = tl.load(lift_ptr + column, mask=column < m, other=float("-inf"))
        score = tl.dot(query, theirs) + lift[None, :]
        better = score > best
        best = tl.where(better, score, best)
        place = tl.where(better, column[None, :], place)
    out = (row.to(tl.int64)[:, None] * strips + strip) * BLOCK_C + c[None, :]
    tl.store(best_ptr + out, best, mask=(row < rows)[:, None])
    tl.store(place_ptr + out, place, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "m", "words"])
def _mark_kernel(
    query_ptr,  # [rows, WIDTH] fp16
    gallery_ptr,  # [M, WIDTH] fp16
    lift_ptr,  # [M] fp32
    threshold_ptr,  # [rows] fp32
    word_ptr,  # [rows, words] int32 out, a bit for each row of the gallery
    rows,
    m,
    words,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    strip, strips = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d, c, w = tl.arange(0, WIDTH), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_C // 32)
    query = tl.load(query_ptr + row[:, None] * WIDTH + d[None, :], mask=(row < rows)[:, None], other=0.0)
    threshold = tl.load(threshold_ptr + row, mask=row < rows, other=float("inf"))
    for start in range(strip * BLOCK_C, m, strips * BLOCK_C):
        column = start + c
        at = column.to(tl.int64)[None, :] * WIDTH + d[:, None]
        theirs = tl.load(gallery_ptr + at, mask=(column < m)[None, :], other=0.0)
        lift = tl.load(lift_ptr + column, mask=column < m, other=float("-inf"))
        upper = tl.dot(query, theirs) + lift[None, :]
        bit = tl.where(upper >= threshold[:, None], 1 << (c % 32)[None, :], 0)
        word = tl.sum(tl.reshape(bit, [BLOCK_R, BLOCK_C // 32, 32]), axis=2)
        out = row.to(tl.int64)[:, None] * words + start // 32 + w[None, :]
        tl.store(word_ptr + out, word, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["words", "first"])
def _append_kernel(
    word_ptr,  # [rows, words] int32
    count_ptr,  # [rows] int32, in and out: candidates so far, those past CAP included
    place_ptr,  # [rows, CAP] int32 out, rows of the gallery
    words,
    first,  # the row that the first bit stands for
    CAP: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    for start in range(0, words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        word = tl.load(word_ptr + row * words + w, mask=w < words, other=0).to(tl.uint32, bitcast=True)
        left = tl.sum((word != 0).to(tl.int32), 0)
        while left > 0:  # the lowest bit of each word, then the next
            some = word != 0
            rest = word & (word - 1)
            bit = ((word ^ rest).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            slot = count + tl.cumsum(some.to(tl.int32), 0) - 1
            tl.store(place_ptr + row * CAP + slot, first + 32 * w + bit, mask=some & (slot < CAP))
            count += left
            word = tl.where(some, rest, 0)
            left = tl.sum((word != 0).to(tl.int32), 0)
    tl.store(count_ptr + row, count)


def search(
    x: torch.Tensor, y: torch.Tensor, short: ShortRows, alone: bool, hint: torch.Tensor | None,
    sq_dist: torch.Tensor, index: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Writes the nearest rows of all rows of ``x`` but those that it returns, whose candidates were too many."""
    k, device = index.shape[1], x.device
    gallery, sizes = short.of(y)
    lift = short.lift(sizes)
    cap = capacity(k)
    open_rows = torch.empty(len(x), dtype=torch.bool, device=device)
    for first in range(0, len(x), _ROWS):
        part = slice(first, min(len(x), first + _ROWS))
        query = torch.arange(part.start, part.stop, device=device)
        mine, size = (gallery[part], sizes[part]) if alone else short.of(x[part])
        named = _guess(mine, gallery, lift, k) if hint is None else hint[part]
        threshold = short.threshold(size, limits(x, y, query, named, k))
        place, count = _candidates(mine, gallery, lift, threshold, cap)
        open_rows[part] = failed = (count > cap) | (count < k)
        count.masked_fill_(failed, 0)
        nearest(x, y, query, place, count, alone, sq_dist, index)
    return open_rows.nonzero().flatten()


def limits(x: torch.Tensor, y: torch.Tensor, query: torch.Tensor, named: torch.Tensor, k: int) -> torch.Tensor:
    """(rows,) float32: the k-th smallest distance from rows ``query`` of ``x`` to different rows ``named`` of ``y``.

    ``named`` is (rows, h) of any integers. Infinity where fewer than k of them are rows.
    """
    if named.shape[1] < k:
        return torch.full((len(query),), torch.inf, dtype=torch.float32, device=x.device)
    named = named.sort(dim=1).values
    valid = (named >= 0) & (named < len(y))
    valid[:, 1:] &= named[:, 1:] != named[:, :-1]
    count = torch.full((len(query),), named.shape[1], dtype=torch.int32, device=x.device)
    dist = distances(x, y, query, named.clamp(0, len(y) - 1).int(), count)
    return dist.masked_fill_(~valid, torch.inf).topk(k, dim=1, largest=False).values.amax(dim=1)


def capacity(k: int) -> int:
    """Most candidates of a row that are kept."""
    return triton.next_power_of_2(max(128, 32 * k))


def guesses(k: int) -> int:
    """How many rows are measured where there is no hint: a few more than k make up for what a guess misses."""
    return k + k // 4 + 2


def _guess(mine, gallery, lift, k):
    """(rows, guesses(k)) int32 rows of the gallery that are likely to be near, below 0 where there are none."""
    (rows, width), m, block = mine.shape, len(gallery), 64
    strips = max(1, min(triton.cdiv(m, block), max(_BINS, 32 * k) // block))
    best = torch.empty(rows, strips * block, dtype=torch.float32, device=mine.device)
    place = torch.empty_like(best, dtype=torch.int32)
    _guess_kernel[(triton.cdiv(rows, 128), strips)](
        mine, gallery, lift, best, place, rows, m,
        WIDTH=width, COLUMNS=GUESSED, BLOCK_R=128, BLOCK_C=block, num_warps=8, num_stages=3,
    )  # fmt: skip
    return place.gather(1, best.topk(min(guesses(k), best.shape[1]), dim=1).indices)


def _candidates(mine, gallery, lift, threshold, cap):
    """Whatever may be within the limit of a row, (rows, cap) int32, and how many there are (rows,)."""
    (rows, width), m, device = mine.shape, len(gallery), mine.device
    block = _columns(device)
    count = torch.zeros(rows, dtype=torch.int32, device=device)
    place = torch.zeros(rows, cap, dtype=torch.int32, device=device)
    for left in range(0, m, _STRETCH):
        part = slice(left, min(m, left + _STRETCH))
        tiles = triton.cdiv(part.stop - left, block)
        word = torch.empty(rows, tiles * (block // 32), dtype=torch.int32, device=device)
        _mark_kernel[(triton.cdiv(rows, 128), min(16, tiles))](
            mine, gallery[part], lift[part], threshold, word, rows, part.stop - left, word.shape[1],
            WIDTH=width, BLOCK_R=128, BLOCK_C=block, num_warps=8, num_stages=2 if width > 128 else 3,
        )  # fmt: skip
        _append_kernel[(rows,)](word, count, place, word.shape[1], left, CAP=cap, BLOCK_W=128, num_warps=1)
    return place, count


def _columns(device):
    """Of a tile: 128 feed the tensor cores best, but 256 numbers each of so many rows need 200 KB of shared memory."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 128 if (major, minor) == (8, 0) or major in (9, 10) else 64

# SPDX-License-Identifier: Apache-2.0
"""Ranks as counts: how many gallery rows lie before each marked distance of each query (Triton, cuBLAS).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Oracle: fastreid_u/reference/rank_metrics.py.

A mark is a (distance, gallery index) of a query, a true match usually; its rank needs no sorted gallery, only the
number of rows before it. Distances are float64 sums rounded to 24 bits, as `measure` gives them. Most rows need no such
sum: a product of matrices places them between two marks, and the rest is measured.

The rows are centred and scaled by a power of two in float64, c, and stored as two float16 numbers, hi + lo: together
exact to 2**-22. hi.hi' is added up in float32 over runs of CHUNK columns, each run a product of its own, hi.lo' and
lo.hi' in another. With R = |c| + sqrt(D) / 4, whose second term covers entries below float16's normal range,

    | computed - |c - c'|^2 |  <=  2 beta R R' + zeta (R^2 + R'^2)
    beta = 2**-20 + (CHUNK + runs + 80) 2**-22 + (D + 32) 2**-31        zeta = 2**-20

beta: lo.lo' and what hi + lo leave out are below 3.1 * 2**-22 R R'; a tensor core may cut off 2**-22 of |a| |b| at each
addition, and the runs' lengths multiply to at most R R' together (Cauchy, Schwarz); the crossed run has 2 D additions
of products below 2**-10 R R'. zeta: the lengths and the last additions in float32, and the 24 bits of the mark.

A row whose interval holds no mark adds 1 at the first mark beyond it; any other is appended to a list. The list holds a
whole tile of scores, so it cannot overflow, and is measured before the next tile, while the tile's rows are in the L2.
All sums are of integers, so the result is one, whoever comes first.

Cost: 6 Q G D on float16 tensor cores, 8 bytes a score and run, one search among a query's marks a score; then 2 D
operations in float64 for each row in doubt. Memory: 4 D bytes a query, 16,384 queries at a time, and 0.3 GB of blocks
at D = 2048. Never Q x G.
"""

import torch
import triton
import triton.language as tl

_ROWS = 16384  # queries that share one pass over the gallery
_TILE = (1024, 4096)  # of scores: 16 MB of float32 a run
_CHUNK = 512  # columns of a run
_RUNS = 16  # at most, longer ones for wider features
_ENTRIES = 1 << 22  # of float64 temporaries while rows are centred


@triton.jit
def _passed(value, column, begin, size, mark_ptr, column_ptr, steps, RULE: tl.constexpr):
    """How many of the ``size`` marks from ``begin`` lie below the value, up to it, or up to (value, column)."""
    low = tl.zeros_like(column)
    high = low + size
    for _ in range(steps):
        open_ = low < high
        middle = (low + high) // 2
        mark = tl.load(mark_ptr + begin + middle, mask=open_, other=0.0)
        if RULE == "below":
            right = mark < value
        elif RULE == "upto":
            right = mark <= value
        else:
            place = tl.load(column_ptr + begin + middle, mask=open_, other=0)
            right = (mark < value) | ((mark == value) & (place <= column))
        low = tl.where(open_ & right, middle + 1, low)
        high = tl.where(open_ & (right == 0), middle, high)
    return low


@triton.jit
def _add(value, column, inside, begin, size, mark_ptr, column_ptr, less_ptr, before_ptr, upto_ptr, steps):
    """Adds a measured (value, column) to the three counts, at the first mark that it comes before."""
    less = _passed(value, column, begin, size, mark_ptr, column_ptr, steps, "upto")
    tl.atomic_add(less_ptr + begin + less, 1, mask=inside & (less < size), sem="relaxed")
    before = _passed(value, column, begin, size, mark_ptr, column_ptr, steps, "pair")
    tl.atomic_add(before_ptr + begin + before, 1, mask=inside & (before < size), sem="relaxed")
    upto = _passed(value, column, begin, size, mark_ptr, column_ptr, steps, "below")
    tl.atomic_add(upto_ptr + begin + upto, 1, mask=inside & (upto < size), sem="relaxed")


@triton.jit(do_not_specialize=["columns", "first_column", "runs", "steps"])
def _rank_count_kernel(
    score_ptr,  # [runs, rows, columns] fp32, whose sum over runs are products of the centred rows
    query_ptr,  # [rows] int32
    size_ptr,  # [rows] fp32, |c|^2
    reach_ptr,  # [rows] fp32, R
    other_size_ptr,  # [columns] fp32
    other_reach_ptr,  # [columns] fp32
    start_ptr,  # [Q + 1] int64
    mark_ptr,  # [M] fp32, scaled like the scores
    sure_ptr,  # [M] int32, in and out
    found_ptr,  # [1] int32, in and out: rows in doubt
    out_query_ptr,  # [rows * columns] int32 out, of the rows in doubt
    out_column_ptr,  # [rows * columns] int32 out
    columns,
    first_column,  # of this tile
    runs,
    steps,  # of the search
    twice_beta,
    zeta,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < columns
    score = tl.zeros([BLOCK_C], tl.float32)
    for run in range(runs):
        place = (run * tl.num_programs(0) + row) * columns + column
        score += tl.load(score_ptr + place, mask=inside, other=0.0)
    size, reach = tl.load(size_ptr + row), tl.load(reach_ptr + row)
    other_size = tl.load(other_size_ptr + column, mask=inside, other=0.0)
    other_reach = tl.load(other_reach_ptr + column, mask=inside, other=0.0)
    value = size + other_size - 2.0 * score
    slack = twice_beta * reach * other_reach + zeta * (reach * reach + other_reach * other_reach)

    query = tl.load(query_ptr + row)
    begin = tl.load(start_ptr + query)
    marks = (tl.load(start_ptr + query + 1) - begin).to(tl.int32)
    beyond = _passed(value - slack, column, begin, marks, mark_ptr, None, steps, "below")
    counted = inside & (beyond < marks)
    sure = counted & (tl.load(mark_ptr + begin + beyond, mask=counted, other=0.0) > value + slack)
    tl.atomic_add(sure_ptr + begin + beyond, 1, mask=sure, sem="relaxed")
    doubt = (counted & (sure == 0)).to(tl.int32)
    found = tl.sum(doubt, axis=0)
    if found > 0:
        # Who comes first in the list is a race; what is in it is not, nor the counts.
        slot = tl.atomic_add(found_ptr, found, sem="relaxed") + tl.cumsum(doubt, 0) - 1
        tl.store(out_query_ptr + slot, query + tl.zeros_like(column), mask=doubt > 0)
        tl.store(out_column_ptr + slot, first_column + column, mask=doubt > 0)


@triton.jit(do_not_specialize=["D"])  # which would change the order of the sum with the caller's alignment
def _rank_measure_kernel(
    x_ptr,  # [Q, D] fp32
    y_ptr,  # [G, D] fp32
    query_ptr,  # [found] int32
    column_ptr,  # [found] int32
    found_ptr,  # [1] int32
    dist_ptr,  # [found] fp64 out
    D,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    found = tl.load(found_ptr)
    for start in range(tl.program_id(0) * BLOCK_E, found, tl.num_programs(0) * BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        i = tl.load(query_ptr + e, mask=e < found, other=0).to(tl.int64)
        j = tl.load(column_ptr + e, mask=e < found, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_E, BLOCK_D], tl.float64)
        for start_d in range(0, D, BLOCK_D):
            d = start_d + tl.arange(0, BLOCK_D)
            inside = (e < found)[:, None] & (d < D)[None, :]
            mine = tl.load(x_ptr + i[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float64)
            theirs = tl.load(y_ptr + j[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float64)
            gap = mine - theirs
            total += gap * gap
        bits = tl.sum(total, axis=1).to(tl.int64, bitcast=True)
        bits = ((bits + 0x0FFFFFFF + ((bits >> 29) & 1)) >> 29) << 29  # 24 bits stay, half to even
        tl.store(dist_ptr + e, bits.to(tl.float64, bitcast=True), mask=e < found)


@triton.jit(do_not_specialize=["steps"])
def _rank_settle_kernel(
    query_ptr,  # [found] int32
    column_ptr,  # [found] int32
    dist_ptr,  # [found] fp64
    found_ptr,  # [1] int32
    start_ptr,  # [Q + 1] int64
    mark_ptr,  # [M] fp64
    mark_column_ptr,  # [M] int64
    less_ptr,  # [M] int32, in and out
    before_ptr,  # [M] int32, in and out
    upto_ptr,  # [M] int32, in and out
    steps,
    BLOCK_E: tl.constexpr,
):
    found = tl.load(found_ptr)
    for start in range(tl.program_id(0) * BLOCK_E, found, tl.num_programs(0) * BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        inside = e < found
        query = tl.load(query_ptr + e, mask=inside, other=0)
        column = tl.load(column_ptr + e, mask=inside, other=0)
        value = tl.load(dist_ptr + e, mask=inside, other=0.0)
        begin = tl.load(start_ptr + query, mask=inside, other=0)
        marks = (tl.load(start_ptr + query + 1, mask=inside, other=0) - begin).to(tl.int32)
        _add(
            value, column, inside, begin, marks, mark_ptr, mark_column_ptr, less_ptr, before_ptr, upto_ptr, steps
        )  # fmt: skip


@triton.jit(do_not_specialize=["G", "steps"])
def _rank_matrix_kernel(
    distmat_ptr,  # [Q, G] fp32 or fp64
    query_ptr,  # [rows] int32
    start_ptr,  # [Q + 1] int64
    mark_ptr,  # [M] fp64
    mark_column_ptr,  # [M] int64
    less_ptr,  # [M] int32, in and out
    before_ptr,  # [M] int32, in and out
    upto_ptr,  # [M] int32, in and out
    G,
    steps,
    BLOCK_C: tl.constexpr,
):
    query = tl.load(query_ptr + tl.program_id(0)).to(tl.int64)
    begin = tl.load(start_ptr + query)
    marks = (tl.load(start_ptr + query + 1) - begin).to(tl.int32)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < G
    value = tl.load(distmat_ptr + query * G + column, mask=inside, other=0.0).to(tl.float64)
    _add(value, column, inside, begin, marks, mark_ptr, mark_column_ptr, less_ptr, before_ptr, upto_ptr, steps)


def measure(query: torch.Tensor, gallery: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """(M,) float64: the squared distances of these pairs, summed in float64 and rounded to 24 significant bits.

    Args:
        query, gallery: (Q, D) and (G, D) float32, finite, D > 0.
        row, column: (M,) int64.

    The order of the sum is the same for every pair and every launch, so copies tie. Memory: 16 bytes a pair.
    """
    _check(query, gallery)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        found = torch.full((1,), len(row), dtype=torch.int32, device=query.device)
        return _measured(query.contiguous(), gallery.contiguous(), row.int(), column.int(), found)


def count(
    query: torch.Tensor, gallery: torch.Tensor, start: torch.Tensor, column: torch.Tensor, distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many gallery rows come before each mark.

    Args:
        query, gallery: (Q, D) and (G, D) float32, finite, D > 0.
        start: (Q + 1,) int64; the marks of query q are ``start[q]`` to ``start[q + 1] - 1``, ascending by (distance,
            column). A query without marks costs nothing.
        column, distance: (M,) int64 and float64; distances as :func:`measure` gives them. A column of G is no gallery
            row: behind all rows of its distance.

    Returns:
        ``(less, before, upto)``, (M,) int64: rows with a smaller distance, rows with a smaller (distance, index), and
        rows with a distance that is not greater.
    """
    _check(query, gallery)
    query, gallery = query.contiguous(), gallery.contiguous()
    marks = _Marks(start, column, distance)
    if len(marks.queries) and len(gallery):
        with torch.cuda.device_of(query):
            _Search(query, gallery, marks).run()
    return marks.counts()


def count_in(
    distmat: torch.Tensor, start: torch.Tensor, column: torch.Tensor, distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with ready distances: ``distmat`` (Q, G), float32 or float64, finite; marks are entries of it."""
    distmat = distmat.contiguous()
    marks = _Marks(start, column, distance)
    if len(marks.queries) and distmat.shape[1]:
        with torch.cuda.device_of(distmat):
            grid = (len(marks.queries), triton.cdiv(distmat.shape[1], 1024))
            _rank_matrix_kernel[grid](
                distmat, marks.queries, *marks.exact(), distmat.shape[1], marks.steps, BLOCK_C=1024, num_warps=4
            )
    return marks.counts()


class _Marks:
    """The marks, and how many rows are to be added from each on."""

    def __init__(self, start, column, distance):
        self.start, self.column, self.distance = start.contiguous(), column.contiguous(), distance.contiguous()
        length = start.diff()
        self.queries = length.nonzero().flatten().int()
        self.steps = int(length.max()).bit_length() if len(length) else 0
        self.sure, self.less, self.before, self.upto = torch.zeros(
            4, len(distance), dtype=torch.int32, device=distance.device
        )

    def exact(self):
        """What the kernels take that place measured rows."""
        return self.start, self.distance, self.column, self.less, self.before, self.upto

    def counts(self):
        added = torch.stack([self.less, self.before, self.upto]).add_(self.sure).cumsum(dim=1)
        before = torch.nn.functional.pad(added, (1, 0))[:, self.start[:-1]]
        return tuple(
            added.sub_(before.repeat_interleave(self.start.diff(), dim=1, output_size=added.shape[1])).unbind()
        )


class _Search:
    """Query and gallery as the count reads them, and the constants of its bounds."""

    def __init__(self, query, gallery, marks):
        dim, device = gallery.shape[1], gallery.device
        self.query, self.gallery, self.marks = query, gallery, marks
        self.mean = gallery.mean(dim=0, dtype=torch.float64)
        ends = (end for part in (query, gallery) for end in torch.aminmax(part, dim=0))
        largest = max(float((end.double() - self.mean).abs().max()) for end in ends)
        exponent = int(torch.tensor(largest, dtype=torch.float64, device="cpu").frexp().exponent)
        self.scale = 2.0 ** (14 - exponent)  # entries up to 2**14; powers of two change no bit of the rest
        self.mark = (marks.distance * self.scale**2).float()

        self.width = triton.cdiv(dim, 8) * 8  # rows of 16 bytes, as tensor cores want them
        self.chunk = max(_CHUNK, triton.cdiv(self.width, 8 * _RUNS) * 8)
        self.runs = triton.cdiv(self.width, self.chunk) + 1
        self.tiny = dim**0.5 / 4
        self.beta = 2.0**-20 + (self.chunk + self.runs + 80) * 2.0**-22 + (self.width + 32) * 2.0**-31
        self.zeta = 2.0**-20

        height, breadth = min(len(marks.queries), _TILE[0]), min(len(gallery), _TILE[1])
        self.score = torch.empty(self.runs * height * breadth, dtype=torch.float32, device=device)
        self.found = torch.zeros(1, dtype=torch.int32, device=device)
        self.doubtful = torch.empty(2, height * breadth, dtype=torch.int32, device=device)

    def run(self):
        for queries in self.marks.queries.split(_ROWS):
            own = self.split(self.query, queries, 0)
            for left in range(0, len(self.gallery), _TILE[1]):
                right = min(len(self.gallery), left + _TILE[1])
                theirs = self.split(self.gallery, slice(left, right), 1)
                for top in range(0, len(queries), _TILE[0]):
                    part = slice(top, min(len(queries), top + _TILE[0]))
                    self._tile(queries[part], [array[part] for array in own], theirs, left)

    def _tile(self, queries, own, theirs, left):
        rows, columns = len(queries), len(theirs[0])
        score = self.score[: self.runs * rows * columns].view(self.runs, rows, columns)
        self.products(own[0], theirs[0], score)
        self.found.zero_()
        _rank_count_kernel[(rows, triton.cdiv(columns, 2048))](
            score, queries, *own[1:], *theirs[1:], self.marks.start, self.mark, self.marks.sure, self.found,
            *self.doubtful, columns, left, self.runs, self.marks.steps, 2 * self.beta, self.zeta,
            BLOCK_C=2048, num_warps=4,
        )  # fmt: skip
        doubtful = self.doubtful[:, : rows * columns]
        distance = _measured(self.query, self.gallery, *doubtful, self.found)
        grid = (min(2048, triton.cdiv(rows * columns, 1024)),)
        _rank_settle_kernel[grid](
            *doubtful, distance, self.found, *self.marks.exact(), self.marks.steps, BLOCK_E=128, num_warps=4
        )

    def split(self, x, rows, place):
        """These rows as halves [hi, lo] (or [lo, hi] for ``place`` 1), their |c|^2 and R."""
        x = x[rows]
        halves = torch.zeros(len(x), 2, self.width, dtype=torch.float16, device=x.device)
        size, reach = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        step = max(1, _ENTRIES // x.shape[1])
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            c = (x[part].double() - self.mean) * self.scale
            square = c.square().sum(dim=1)
            size[part], reach[part] = square, square.sqrt() + self.tiny
            halves[part, place, : x.shape[1]] = c  # rounded
            halves[part, 1 - place, : x.shape[1]] = c - halves[part, place, : x.shape[1]]
        return halves.view(len(x), 2 * self.width), size, reach

    def products(self, own, theirs, score):
        """hi.hi' by runs of columns; then hi.lo' and lo.hi' in one, as their halves lie the other way round."""
        for run, first in enumerate(range(0, self.width, self.chunk)):
            last = min(self.width, first + self.chunk)
            _product(own[:, first:last], theirs[:, self.width + first : self.width + last], score[run])
        _product(own, theirs, score[-1])


def _product(a, b, out):
    """``out`` = a b^T of float16 rows, added in float32."""
    if a.is_cuda:
        torch.mm(a, b.T, out_dtype=torch.float32, out=out)
    else:  # interpreted: a CPU has no such product, but those of float16 numbers are exact in float32
        torch.mm(a.float(), b.float().T, out=out)


def _measured(query, gallery, row, column, found):
    """The distances of the first ``found`` of these pairs; the others hold anything."""
    distance = torch.empty(len(row), dtype=torch.float64, device=row.device)
    if len(row):
        block = {"BLOCK_E": 8, "BLOCK_D": min(256, triton.next_power_of_2(query.shape[1])), "num_warps": 4}
        grid = (min(4096, triton.cdiv(len(row), 64)),)
        _rank_measure_kernel[grid](query, gallery, row, column, found, distance, query.shape[1], **block)
    return distance


def _check(query, gallery):
    if query.dtype != torch.float32 or gallery.dtype != torch.float32:
        raise TypeError(f"rank_metrics: want query and gallery float32, got {query.dtype} and {gallery.dtype}")
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1] or query.shape[1] == 0:
        raise ValueError(
            "rank_metrics: query and gallery must be (Q, D) and (G, D) with D > 0, got "
            f"{tuple(query.shape)} and {tuple(gallery.shape)}"
        )

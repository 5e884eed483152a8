# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal encoding in integers, from neighbour lists and features (Triton).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Method: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, sections 3.2 to 3.4,
with the neighbour counts of the published clustering code. Oracle: fastreid_u/reference/k_reciprocal.py.

Weights are fixed point: a row of V holds integers that add up to exactly 2**bits (running sums of the softmax, rounded,
each less the one before), and query expansion adds ``k2`` such rows without the division. Sums of integers do not
depend on the order of their terms, so whatever reads the encoding (atomics, other block sizes, other devices) gets the
same bits, also where distances tie.

Cost a row at k1 = 30: about 1,000 list entries read, |V| ~ 30 feature rows gathered (which bounds the time), and
L**2 compares to merge the L ~ 150 entries of k2 rows. Memory: 4 (k1 + k1 / 2) + 8 |V| + 8 |V'| bytes a row, and blocks
of bounded size while it runs.
"""

import torch
import triton
import triton.language as tl

_SLOTS = 1 << 22  # list entries in work at a time: 16 MB an int32 array


@triton.jit
def _mutual_kernel(
    list_ptr,  # [N, K] int32, neighbours in rank order
    full_ptr,  # [N, K] int32 out: those that list i among their K, others -1
    half_ptr,  # [N, H] int32 out: the same among the first H
    K,
    H,
    BLOCK_A: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    j = tl.load(list_ptr + i * K + a, mask=a < K, other=-1)
    place = tl.full([BLOCK_A], 2147483647, tl.int32)  # rank of i in the list of j
    for start in range(0, K, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (j >= 0)[:, None] & (p < K)[None, :]
        back = tl.load(list_ptr + j.to(tl.int64)[:, None] * K + p[None, :], mask=inside, other=-1)
        place = tl.minimum(place, tl.min(tl.where(back == i.to(tl.int32), p[None, :], 2147483647), axis=1))
    tl.store(full_ptr + i * K + a, tl.where(place < K, j, -1), mask=a < K)
    tl.store(half_ptr + i * H + a, tl.where(place < H, j, -1), mask=a < H)


@triton.jit(do_not_specialize=["first_row"])
def _expand_kernel(
    full_ptr,  # [N, K] int32, -1 where not mutual
    half_ptr,  # [N, H] int32
    member_ptr,  # [rows, W] int32 out: members in no order, some twice
    count_ptr,  # [rows] int32 out
    first_row,
    K,
    H,
    W,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = row + first_row
    h = tl.arange(0, BLOCK_H)
    count = 0
    for start in range(0, K, BLOCK_Q):
        a = start + tl.arange(0, BLOCK_Q)
        q = tl.load(full_ptr + i * K + a, mask=a < K, other=-1)
        mutual = (q >= 0).to(tl.int32)
        tl.store(member_ptr + row * W + count + tl.cumsum(mutual, 0) - 1, q, mask=q >= 0)
        count += tl.sum(mutual, 0)

        inside = (q >= 0)[:, None] & (h < H)[None, :]
        near = tl.load(half_ptr + q.to(tl.int64)[:, None] * H + h[None, :], mask=inside, other=-1)  # [Q, H]
        known = near < -1
        for b in range(K):  # against the mutual list itself, not the growing set
            known = known | (near == tl.load(full_ptr + i * K + b))
        live = near >= 0
        size = tl.sum(live.to(tl.int32), axis=1)
        shared = tl.sum((known & live).to(tl.int32), axis=1)
        taken = (3 * shared > 2 * size)[:, None] & live & (known == 0)  # two thirds exactly is not enough

        fresh = tl.reshape(taken.to(tl.int32), [BLOCK_Q * BLOCK_H])
        slot = tl.reshape(count + tl.cumsum(fresh, 0) - 1, [BLOCK_Q, BLOCK_H])
        tl.store(member_ptr + row * W + slot, near, mask=taken)
        count += tl.sum(fresh, 0)
    tl.store(count_ptr + row, count)


@triton.jit
def _merge_kernel(
    col_ptr,  # int32, row r at [begin[r], begin[r] + length[r])
    mass_ptr,  # int32 beside it; not read without HAS_MASS
    begin_ptr,  # [rows] int64
    length_ptr,  # [rows] int32
    out_col_ptr,  # like col_ptr, -1 before
    out_mass_ptr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_MASS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(begin_ptr + row)
    length = tl.load(length_ptr + row)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    own = tl.load(col_ptr + begin + t, mask=t < length, other=-1)
    # Rank by counting, with the compared entries along axis 0 so that each lane adds up its own column.
    smaller = tl.zeros([BLOCK_T], tl.int32)
    earlier = tl.zeros([BLOCK_T], tl.int32)
    mass = tl.zeros([BLOCK_T], tl.int32)
    if tl.program_id(1) * BLOCK_T < length:
        for start in range(0, length, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            other = tl.load(col_ptr + begin + e, mask=e < length, other=2147483647)
            same = other[:, None] == own[None, :]
            smaller += tl.sum((other[:, None] < own[None, :]).to(tl.int32), axis=0)
            earlier += tl.sum((same & (e[:, None] < t[None, :])).to(tl.int32), axis=0)
            if HAS_MASS:
                part = tl.load(mass_ptr + begin + e, mask=e < length, other=0)
                mass += tl.sum(tl.where(same, part[:, None], 0), axis=0)
        # The first of equal columns stands for all; slots of the others stay -1 and are dropped afterwards.
        first = (t < length) & (earlier == 0)
        tl.store(out_col_ptr + begin + smaller, own, mask=first)
        if HAS_MASS:
            tl.store(out_mass_ptr + begin + smaller, mass, mask=first)


@triton.jit(do_not_specialize=["first_row"])
def _distance_kernel(
    x_ptr,  # [N, D] fp32
    crow_ptr,  # [rows + 1] int64
    col_ptr,  # int32
    dist_ptr,  # fp64 out, beside col_ptr
    first_row,
    D,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPAT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(crow_ptr + row)
    end = tl.load(crow_ptr + row + 1)
    for start in range(begin, end, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        j = tl.load(col_ptr + e, mask=e < end, other=0).to(tl.int64)
        # float64 costs nothing beside the gather, and leaves the rounding of V no room to depend on the order of sums
        total = tl.zeros([BLOCK_E, BLOCK_D], tl.float64)
        for start_d in range(0, D, BLOCK_D):
            d = start_d + tl.arange(0, BLOCK_D)
            mine = tl.load(x_ptr + (row + first_row) * D + d, mask=d < D, other=0.0).to(tl.float64)
            inside = (e < end)[:, None] & (d < D)[None, :]
            theirs = tl.load(x_ptr + j[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float64)
            if COMPAT:
                total += mine[None, :] * theirs
            else:
                gap = mine[None, :] - theirs
                total += gap * gap
        dist = tl.sum(total, axis=1)
        if COMPAT:
            dist = 2.0 - 2.0 * dist
        tl.store(dist_ptr + e, dist, mask=e < end)


@triton.jit
def _weigh_kernel(
    crow_ptr,  # [rows + 1] int64
    dist_ptr,  # fp64
    mass_ptr,  # int32 out, a row adds up to SCALE
    SCALE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(crow_ptr + row)
    length = tl.load(crow_ptr + row + 1) - begin
    t = tl.arange(0, BLOCK_W)
    live = t < length
    if length > 0:
        dist = tl.load(dist_ptr + begin + t, mask=live, other=float("inf"))
        weight = tl.exp(tl.min(dist, 0) - dist)
        share = tl.cumsum(weight, 0) / tl.sum(weight, 0) * SCALE
        # Adding 2**52 leaves a float64 no bits after the point: round half to even, on every device. The last running
        # sum is off by a few 2**-53 at most and rounds to SCALE.
        upto = ((share + 4503599627370496.0) - 4503599627370496.0).to(tl.int32)
        before = tl.gather(upto, tl.maximum(t - 1, 0), 0)
        tl.store(mass_ptr + begin + t, upto - tl.where(t > 0, before, 0), mask=live)


@triton.jit
def _exp_float32(x):
    """Rounded once; a GPU's own float32 exponential and its division are approximations."""
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@triton.jit
def _weigh_float32_kernel(
    crow_ptr,  # [rows + 1] int64
    dist_ptr,  # fp64
    weight_ptr,  # fp32 out
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(crow_ptr + row)
    length = tl.load(crow_ptr + row + 1) - begin
    t = tl.arange(0, BLOCK_W)
    live = t < length
    if length > 0:
        dist = tl.load(dist_ptr + begin + t, mask=live, other=float("inf")).to(tl.float32)
        lowest = tl.min(dist, 0)
        total = tl.zeros([], tl.float32)
        for p in range(length):  # one term after the other, in ascending order of columns
            total += _exp_float32(lowest - tl.load(dist_ptr + begin + p).to(tl.float32))
        tl.store(weight_ptr + begin + t, tl.div_rn(_exp_float32(lowest - dist), total), mask=live)


def bits(k2: int) -> int:
    """A row of V adds up to 2**bits: 28 for k2 up to 7, 24 up to 127; ``k2`` rows together stay below 2**31."""
    return min(28, 31 - k2.bit_length())


def k_reciprocal(
    x: torch.Tensor | None,
    index: torch.Tensor,
    k1: int = 30,
    k2: int = 6,
    *,
    compat: bool = False,
    half: int | None = None,
    measure=None,
    fixed: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Encode every row of ``x``.

    Args:
        x: (N, D) float32; not read with ``measure``.
        index: (N, at least k1 and k2) int32 or int64, neighbours in rank order, the row itself included, no repeats in
            a row.
        k1: neighbours examined; beyond N clipped.
        k2: rows summed in query expansion; 1 turns it off.
        compat: weigh by 2 - 2 x.y instead of the squared distance.
        half: entries of the half lists, at most k1; round-half-even(k1 / 2) + 1 if None.
        measure: a function; ``measure(row, col)``, both (pairs,) int64, gives the float64 distances that weights are
            made of, in place of those of ``x``.
        fixed: integers; if not, the published arithmetic: distances are summed in float64 and rounded once, weights and
            all further sums, those of a softmax by column and those of query expansion by rank, are float32.

    Returns:
        ``(crow, col, mass, total)``: a CSR matrix (N, N) of crow (N + 1,) int64, col int32 ascending in each row and
        mass int32 > 0; a row adds up to ``total`` = k2 * 2**bits(k2), less if some of its first k2 rows of V are empty
        (a row that its own list leaves out can be). The soft membership of the paper is mass / total. Without ``fixed``
        mass is float32, already divided, and total is 1.
    """
    if measure is not None:
        x = index.new_empty(len(index), 0, dtype=torch.float32)
    n = len(x)
    k1, k2 = min(k1, n), min(k2, n)
    if x.dtype != torch.float32 or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"k_reciprocal: want x float32 and index int32 or int64, got {x.dtype} and {index.dtype}")
    if x.ndim != 2 or index.ndim != 2 or len(index) != n or index.shape[1] < max(k1, k2):
        raise ValueError(f"k_reciprocal: index must be (N, >= {max(k1, k2)}), got {tuple(index.shape)} for N={n}")
    if n == 0:
        empty = torch.zeros(0, dtype=torch.int32, device=x.device)
        return torch.zeros(1, dtype=torch.int64, device=x.device), empty, empty, 1 << bits(1)
    x = x.contiguous()
    lists = index[:, : max(k1, k2)].to(torch.int32)
    # Python rounds halves to even, as the published np.around does: k1 = 25 gives 12 + 1
    half = round(k1 / 2) + 1 if half is None else half

    with torch.cuda.device_of(x):  # Triton launches on the current device
        scale = 1 << bits(k2) if fixed else None
        crow, col, mass = _encode(x, lists[:, :k1].contiguous(), half, scale, compat, measure)
        if k2 > 1:
            expand = _expand_query if fixed else _average_rows
            averaged = lists if measure else lists[_first_copies(x, lists)]
            crow, col, mass = expand(crow, col, mass, averaged[:, :k2])
    return crow, col, mass, k2 << bits(k2) if fixed else 1


def _encode(x, lists, h, scale, compat, measure):
    n, k = lists.shape
    full, half = torch.empty_like(lists), lists.new_empty(n, h)
    _mutual_kernel[(n, triton.cdiv(k, 32))](lists, full, half, k, h, BLOCK_A=32, BLOCK_P=32, num_warps=1)

    # Of an accepted half list more than two thirds are in the set already: at most (h - 1) // 3 of it are new.
    width = k * (1 + (h - 1) // 3)
    block_h = triton.next_power_of_2(h)
    block_q = max(1, min(triton.next_power_of_2(k), 4096 // block_h))
    cols, masses, counts = [], [], []
    for first in range(0, n, max(1, _SLOTS // width)):
        rows = min(max(1, _SLOTS // width), n - first)
        member, count = lists.new_empty(rows * width), lists.new_empty(rows)
        _expand_kernel[(rows,)](
            full,
            half,
            member,
            count,
            first,
            k,
            h,
            width,
            BLOCK_Q=block_q,
            BLOCK_H=block_h,
            num_warps=1 if block_q * block_h <= 1024 else 4,
        )
        begin = torch.arange(rows, device=x.device) * width
        ordered, _ = _merge(member, None, begin, count)
        # slots past a row's members were never written in ``member`` and are -1 in ``ordered``
        kept = ordered >= 0
        col = ordered[kept]
        count = kept.view(rows, width).sum(dim=1)
        crow = _starts(count)
        if measure is None:
            dist = torch.empty(len(col), dtype=torch.float64, device=x.device)
            _distance_kernel[(rows,)](
                x,
                crow,
                col,
                dist,
                first,
                x.shape[1],
                BLOCK_E=8,
                BLOCK_D=min(256, triton.next_power_of_2(x.shape[1])),
                COMPAT=compat,
                num_warps=4,
            )
        else:
            row = torch.repeat_interleave(torch.arange(first, first + rows, device=x.device), count)
            dist = measure(row, col.long())
        mass = torch.empty_like(col, dtype=torch.int32 if scale else torch.float32)
        block_w = triton.next_power_of_2(max(1, int(count.max())))
        warps = 1 if block_w <= 128 else 4
        if scale:
            _weigh_kernel[(rows,)](crow, dist, mass, SCALE=scale, BLOCK_W=block_w, num_warps=warps)
        else:
            _weigh_float32_kernel[(rows,)](crow, dist, mass, BLOCK_W=block_w, num_warps=warps)
        alive = mass > 0  # a member too far off weighs nothing
        cols.append(col[alive])
        masses.append(mass[alive])
        counts.append(_starts(alive)[crow].diff())
    return _starts(torch.cat(counts)), torch.cat(cols), torch.cat(masses)


def _first_copies(x, lists):
    """(N,) the copy of the lowest index of each row: its list is in the order of (distance, index), as all their lists
    would be if a row did not stand before its copies in its own."""
    first = torch.arange(len(x), device=x.device)
    rows = ((lists[:, 0] == first) & (lists[:, 1] < first)).nonzero()[:, 0]
    for part in rows.split(max(1, _SLOTS // max(1, x.shape[1]))):
        other = lists[part, 1].long()
        sq_dist = (x[part].double() - x[other].double()).square().sum(dim=1).float()
        first[part] = torch.where(sq_dist == 0, other, part)
    return first


def _expand_query(crow, col, mass, lists):
    """Row i becomes the sum of the rows that ``lists[i]`` names."""
    sizes = crow.diff()
    lengths = sizes[lists]  # [N, k2]
    cols, masses, counts = [], [], []
    for first, last in _row_blocks(lengths.sum(dim=1)):
        source, length = lists[first:last].reshape(-1), lengths[first:last].reshape(-1)
        begin = _starts(length)
        total = int(begin[-1])
        where = torch.repeat_interleave(crow[source] - begin[:-1], length, output_size=total)
        where += torch.arange(total, device=col.device)
        begin = begin[:: lists.shape[1]].contiguous()
        ordered, summed = _merge(col[where], mass[where], begin, begin.diff().to(torch.int32))
        kept = ordered >= 0
        cols.append(ordered[kept])
        masses.append(summed[kept])
        counts.append(_starts(kept)[begin].diff())
    return _starts(torch.cat(counts)), torch.cat(cols), torch.cat(masses)


def _average_rows(crow, col, mass, lists):
    """Row i becomes the mean of the rows that ``lists[i]`` names, added in that order in float32: a pass for each rank.

    A row holds a column once, so no two terms of a pass meet.
    """
    n, k2 = lists.shape
    sizes = crow.diff()
    cols, masses, counts = [], [], []
    for first, last in _row_blocks(sizes[lists].sum(dim=1)):
        terms = []
        for source in lists[first:last].unbind(1):
            length = sizes[source]
            row = torch.repeat_interleave(torch.arange(last - first, device=col.device), length)
            where = torch.arange(len(row), device=col.device) + (crow[source] - _starts(length)[:-1])[row]
            terms.append((row * n + col[where], mass[where]))
        key = torch.cat([part for part, _ in terms]).unique()
        total = mass.new_zeros(len(key))
        for part, term in terms:
            total[torch.searchsorted(key, part)] += term
        cols.append((key % n).int())
        masses.append(total / total.new_full((), k2))  # by a number, a GPU would multiply with the rounded 1 / k2
        counts.append((key // n).bincount(minlength=last - first))
    return _starts(torch.cat(counts)), torch.cat(cols), torch.cat(masses)


def _merge(col, mass, begin, length):
    """Sort every row by column and add up equal columns, leaving -1 in the slots that this frees."""
    out_col, out_mass = torch.full_like(col, -1), None if mass is None else torch.empty_like(mass)
    longest = int(length.max())
    if longest:
        _merge_kernel[(len(length), triton.cdiv(longest, 64))](
            col, mass, begin, length, out_col, out_mass, BLOCK_T=64, BLOCK_E=32, HAS_MASS=mass is not None, num_warps=1
        )
    return out_col, out_mass


def _starts(counts):
    """Counts to offsets: (n,) to (n + 1,) int64."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))


def _row_blocks(work):
    """Cut rows into runs of at most ``_SLOTS`` units of work, or of one row."""
    end = work.cumsum(0).cpu()
    first = 0
    while first < len(end):
        done = int(end[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(end, done + _SLOTS, right=True)))
        yield first, last
        first = last

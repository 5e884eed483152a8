# SPDX-License-Identifier: Apache-2.0
"""Near pairs in Jaccard distance between integer rows, by inverted lists and a hash table a row (Triton).

Stands alone: needs torch and triton, nothing else; copy this file to use it elsewhere.
Method: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, section 3.3, as an
exact similarity join. Oracle: fastreid_u/reference/jaccard.py.

Rows have weight W and overlap T = sum of min; their distance is J(T) = 1 - T / (2 W - T), and J <= radius is T >= need,
an integer found once with the expression that stores J. Sums are of integers: atomics may add them in any order, the
pair (i, j) is measured once and stored twice, and nothing is decided by a rounding error.

Filter: order columns by how many rows hold them, rare first; the prefix of a row is its shortest head whose tail weighs
at most ``tail``. Let a be where the earlier of two prefixes ends. Shared columns up to a lie in both prefixes, the
others in the tail of the row whose prefix ends at a. So rows that overlap by ``need`` overlap by need - tail within
their prefixes. Only prefixes enter the lists, which keeps most of the hubs (last in every row) out; who passes is
measured on the whole rows.

Cost: one atomic or two for each (i, j <= i, shared prefix column), about 1,200 a row; a binary search per entry for
each of the about 10 rows that pass. Memory: 60 bytes an entry of the encoding, one block of tables (64 MB), 60 bytes a
near pair while the result is sorted, of which 12 stay. If every point is near every other, that is N^2 pairs.
"""

import torch
import triton
import triton.language as tl

_TAIL = 0.7  # of ``need``; the work is flat between 0.5 and 0.7
_SLOTS = 1 << 23  # 8-byte slots of the tables of one block of rows
_BLOCK, _LANES = 256, 32  # lists have about 30 entries: 8 of them a program, 32 lanes each


@triton.jit(do_not_specialize=["first_entry", "last_entry", "first_slot", "N"])
def _meet_kernel(
    row_ptr,  # [entries] int32, the prefixes of all rows
    mass_ptr,  # [entries] int32
    list_begin_ptr,  # [entries] int64, list of the entry's column ...
    list_end_ptr,  # [entries] int64, ... up to the entry's own place in it, that one included: rows j <= i
    list_row_ptr,  # int32, ascending within a list
    list_mass_ptr,  # int32
    slot_begin_ptr,  # [N] int64
    log2_size_ptr,  # [N] int32
    table_ptr,  # [slots] int64, 0 before; after: (j + 1) << 32 | overlap
    first_entry,
    last_entry,
    first_slot,
    N,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    # A warp's worth of lanes walks one list, BLOCK / LANES lists side by side.
    lane = tl.arange(0, BLOCK)
    p = tl.program_id(0).to(tl.int64) * (BLOCK // LANES) + lane // LANES + first_entry
    i = tl.load(row_ptr + p, mask=p < last_entry, other=0)
    own = tl.load(mass_ptr + p, mask=p < last_entry, other=0)
    begin = tl.load(list_begin_ptr + p, mask=p < last_entry, other=0)
    length = tl.load(list_end_ptr + p, mask=p < last_entry, other=0) - begin
    # lanes of no entry get slot 0 of this block
    table = table_ptr + tl.maximum(tl.load(slot_begin_ptr + i) - first_slot, 0)
    log2_size = tl.load(log2_size_ptr + i, mask=p < last_entry, other=0).to(tl.int64)
    wrap = (tl.full([BLOCK], 1, tl.int64) << log2_size) - 1
    for start in range(0, tl.max(length, 0), LANES):
        e = start + lane % LANES
        live = e < length
        j = tl.load(list_row_ptr + begin + e, mask=live, other=0).to(tl.int64)
        mass = tl.minimum(own, tl.load(list_mass_ptr + begin + e, mask=live, other=0)).to(tl.int64)
        # row j itself if the table has a slot for each row, else a multiplicative hash
        slot = tl.where(wrap + 1 >= N, j, ((j * 2654435769) & 0xFFFFFFFF) >> (32 - log2_size))
        slot = tl.where(live, slot, lane & wrap)  # idle lanes swap 0 for 0 in places of their own
        key = j + 1
        pending = live.to(tl.int32)
        while tl.max(pending, 0) > 0:
            # Compare-and-swap takes no mask; a lane that is done swaps 0 for 0, which changes nothing.
            fresh = tl.where(pending > 0, (key << 32) | mass, 0)
            old = tl.atomic_cas(table + slot, tl.zeros([BLOCK], tl.int64), fresh, sem="relaxed")
            found = (old >> 32) == key
            tl.atomic_add(table + slot, mass, mask=(pending > 0) & found, sem="relaxed")
            pending = tl.where((old == 0) | found, 0, pending)
            slot = tl.where(pending > 0, (slot + 1) & wrap, slot)


@triton.jit(do_not_specialize=["first_row", "first_slot", "enough"])
def _pass_kernel(
    table_ptr,  # [slots] int64
    slot_begin_ptr,  # [N + 1] int64
    count_ptr,  # [rows] int32 out, without FILL
    begin_ptr,  # [rows] int64, where the row's pairs go, with FILL
    pair_row_ptr,  # [pairs] int32 out
    pair_col_ptr,  # [pairs] int32 out
    overlap_ptr,  # [pairs] int32 out
    first_row,
    first_slot,
    enough,
    BLOCK: tl.constexpr,
    FILL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = row + first_row
    end = tl.load(slot_begin_ptr + i + 1) - first_slot
    count = tl.zeros([], tl.int64)
    if FILL:
        count += tl.load(begin_ptr + row)
    for start in range(tl.load(slot_begin_ptr + i) - first_slot, end, BLOCK):
        s = start + tl.arange(0, BLOCK)
        entry = tl.load(table_ptr + s, mask=s < end, other=0)
        overlap = entry & 0xFFFFFFFF
        passed = ((entry != 0) & (overlap >= enough)).to(tl.int64)
        if FILL:
            out = count + tl.cumsum(passed, 0) - 1
            tl.store(pair_row_ptr + out, (i + tl.zeros([BLOCK], tl.int64)).to(tl.int32), mask=passed > 0)
            tl.store(pair_col_ptr + out, ((entry >> 32) - 1).to(tl.int32), mask=passed > 0)
            tl.store(overlap_ptr + out, overlap.to(tl.int32), mask=passed > 0)
        count += tl.sum(passed, 0)
    if not FILL:
        tl.store(count_ptr + row, count.to(tl.int32))


@triton.jit(do_not_specialize=["pairs", "steps"])
def _overlap_kernel(
    crow_ptr,  # [N + 1] int64
    col_ptr,  # [nnz] int32, ascending in each row
    mass_ptr,  # [nnz] int32
    pair_row_ptr,  # [pairs] int32
    pair_col_ptr,  # [pairs] int32
    overlap_ptr,  # [pairs] int32 out
    pairs,
    steps,  # of a binary search in the longest row
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * (BLOCK // LANES)
    pair = first + lane // LANES
    i = tl.load(pair_row_ptr + pair, mask=pair < pairs, other=0)
    j = tl.load(pair_col_ptr + pair, mask=pair < pairs, other=0)
    begin = tl.load(crow_ptr + i)
    count = (tl.load(crow_ptr + i + 1) - begin).to(tl.int32)
    other = tl.load(crow_ptr + j)
    length = (tl.load(crow_ptr + j + 1) - other).to(tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tl.max(count, 0), LANES):
        e = start + lane % LANES
        live = e < count
        column = tl.load(col_ptr + begin + e, mask=live, other=0)
        low = tl.zeros([BLOCK], tl.int32)
        high = tl.where(live, length, 0)
        for _ in range(steps):
            ajar = low < high
            middle = (low + high) // 2
            less = tl.load(col_ptr + other + middle, mask=ajar, other=0) < column
            low = tl.where(ajar & less, middle + 1, low)
            high = tl.where(ajar & (less == 0), middle, high)
        inside = live & (low < length)
        same = inside & (tl.load(col_ptr + other + low, mask=inside, other=-1) == column)
        mine = tl.load(mass_ptr + begin + e, mask=same, other=0)
        total += tl.minimum(mine, tl.load(mass_ptr + other + low, mask=same, other=0))
    part = tl.arange(0, BLOCK // LANES)
    tl.store(
        overlap_ptr + first + part, tl.sum(tl.reshape(total, [BLOCK // LANES, LANES]), 1), mask=first + part < pairs
    )


def to_distance(overlap: torch.Tensor, weight: int) -> torch.Tensor:
    """J of integer overlaps, float32. Both sides of the fraction are exact, so J never rises with the overlap."""
    overlap = overlap.double()
    return (2 * (weight - overlap) / (2 * weight - overlap)).float()


def least_overlap(radius: float, weight: int) -> int:
    """The smallest T with float32 J(T) <= float32(radius) and J(T) < 1."""
    radius = float(torch.tensor(radius, dtype=torch.float32, device="cpu"))
    low, high = 1, weight  # J(weight) = 0 fits
    while low < high:
        middle = (low + high) // 2
        distance = float(to_distance(torch.tensor(middle, device="cpu"), weight))
        low, high = (low, middle) if distance <= radius and distance < 1 else (middle + 1, high)
    return low


def jaccard(
    crow: torch.Tensor, col: torch.Tensor, mass: torch.Tensor, weight: int, radius: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pairs of rows with J <= radius and J < 1.

    Args:
        crow: (N + 1,) int64, start of each row of the encoding, as ``k_reciprocal`` in the file of that name makes it.
        col: (nnz,) int32, ascending in each row, below N.
        mass: (nnz,) int32, positive; a row adds up to at most ``weight``.
        weight: full weight of a row, below 2**31.
        radius: in [0, 1], compared in float32, inclusive.

    Returns:
        ``(crow, col, distance)``: a symmetric CSR matrix (N, N) of int64, int64 and float32, columns ascending, the
        diagonal included (a row far short of ``weight`` may miss it) and J = 0 stored as an explicit zero.
    """
    if crow.dtype != torch.int64 or col.dtype != torch.int32 or mass.dtype != torch.int32:
        raise TypeError(f"jaccard: want crow int64, col and mass int32, got {crow.dtype}, {col.dtype}, {mass.dtype}")
    if crow.ndim != 1 or len(crow) == 0 or col.ndim != 1 or col.shape != mass.shape:
        shapes = tuple(crow.shape), tuple(col.shape), tuple(mass.shape)
        raise ValueError(f"jaccard: crow must be (N + 1,) and col and mass (nnz,), got {shapes}")
    if not 0 < weight < 2**31:
        raise ValueError(f"jaccard: weight must lie in [1, 2**31), got {weight}")
    crow, col, mass = crow.contiguous(), col.contiguous(), mass.contiguous()
    n = len(crow) - 1
    need = least_overlap(radius, weight)
    # With so large a radius prefixes are nearly whole rows: make them whole, and their overlap is T itself.
    tail = int(_TAIL * need) if need > weight // 8 else 0

    with torch.cuda.device_of(col):  # Triton launches on the current device
        pairs = list(_near_half(crow, col, mass, need, tail)) if len(col) else []
    row, column, overlap = (
        torch.cat([pair[part] for pair in pairs]) if pairs else col.new_zeros(0) for part in range(3)
    )
    below = row != column
    key = torch.cat([row.long() * n + column, column[below].long() * n + row[below]])
    key, order = key.sort()
    distance = to_distance(torch.cat([overlap, overlap[below]])[order], weight)
    start = torch.searchsorted(key, torch.arange(n + 1, device=key.device) * n)
    return start, key % max(n, 1), distance


def _near_half(crow, col, mass, need, tail):
    """Blocks of ``(row, column <= row, overlap)`` with overlap >= need, int32, in no order."""
    n, device = len(crow) - 1, col.device
    row, list_begin, list_end, own, list_row, list_mass = _index(crow, col, mass, tail)
    entry_begin = _starts(row.bincount(minlength=n))

    # A row meets at most ``met`` others, and none after itself: a table of twice that, or of one slot for each row.
    met = torch.zeros(n, dtype=torch.int64, device=device).index_add_(0, row, list_end - list_begin)
    met = torch.minimum(met, torch.arange(1, n + 1, device=device))
    log2_size = torch.log2((2 * met).clamp(2, max(n, 2)).double()).ceil().int()
    slot_begin = _starts((met > 0).long() << log2_size)

    steps = int(crow.diff().max()).bit_length()
    table = torch.empty(0, dtype=torch.int64, device=device)
    row = row.int()
    for first, last, first_slot, slots in _row_blocks(slot_begin):
        if slots == 0:  # rows without members, or too light to be near anything
            continue
        if slots > len(table):
            table = torch.empty(slots, dtype=torch.int64, device=device)
        table[:slots].zero_()
        first_entry, last_entry = entry_begin[[first, last]].tolist()
        _meet_kernel[(triton.cdiv(last_entry - first_entry, _BLOCK // _LANES),)](
            row, own, list_begin, list_end, list_row, list_mass, slot_begin, log2_size, table,
            first_entry, last_entry, first_slot, n, BLOCK=_BLOCK, LANES=_LANES, num_warps=2,
        )  # fmt: skip
        count = torch.empty(last - first, dtype=torch.int32, device=device)
        args = first, first_slot, need - tail
        _pass_kernel[(last - first,)](table, slot_begin, count, None, None, None, None, *args, BLOCK=512, FILL=False)
        begin = _starts(count)
        found = int(begin[-1])
        if found == 0:
            continue
        pair_row, pair_col, overlap = (col.new_empty(found) for _ in range(3))
        _pass_kernel[(last - first,)](
            table, slot_begin, None, begin, pair_row, pair_col, overlap, *args, BLOCK=512, FILL=True
        )
        if tail:
            _overlap_kernel[(triton.cdiv(found, _BLOCK // _LANES),)](
                crow, col, mass, pair_row, pair_col, overlap, found, steps, BLOCK=_BLOCK, LANES=_LANES, num_warps=2
            )
            near = overlap >= need
            pair_row, pair_col, overlap = pair_row[near], pair_col[near], overlap[near]
        yield pair_row, pair_col, overlap


def _index(crow, col, mass, tail):
    """Prefix entries by row, and the inverted lists of the prefixes.

    Returns row int64, begin and end of the entry's list int64, mass int32; then row and mass by list, int32.
    """
    n = len(crow) - 1
    row = torch.repeat_interleave(torch.arange(n, device=col.device), crow.diff(), output_size=len(col))
    name = torch.empty(n, dtype=torch.int64, device=col.device)
    name[col.bincount(minlength=n).argsort(stable=True)] = torch.arange(n, device=col.device)
    key, order = (row * n + name[col]).sort()  # rows stay where they are, their columns come rare first
    mass = mass[order]

    upto = _starts(mass)
    in_prefix = upto[crow[1:]][row] - upto[:-1] > tail  # what the row weighs from this entry on
    row, name, mass = row[in_prefix], (key - row * n)[in_prefix], mass[in_prefix]
    by_column = name.argsort(stable=True)
    end = torch.empty_like(by_column)
    end[by_column] = torch.arange(1, len(name) + 1, device=col.device)
    begin = _starts(name.bincount(minlength=n))[name]
    return row, begin, end, mass, row[by_column].int(), mass[by_column]


def _starts(counts):
    """Counts to offsets: (n,) to (n + 1,) int64."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))


def _row_blocks(begin):
    """Cut rows into runs of at most ``_SLOTS`` slots, or of one row: (first row, last row, first slot, slots)."""
    begin = begin.cpu()
    first = 0
    while first < len(begin) - 1:
        done = int(begin[first])
        last = max(first + 1, int(torch.searchsorted(begin, done + _SLOTS, right=True)) - 1)
        yield first, last, done, int(begin[last]) - done
        first = last

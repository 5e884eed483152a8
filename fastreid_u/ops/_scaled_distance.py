# SPDX-License-Identifier: Apache-2.0
"""The distances that re-ranking compares, squared and divided by the largest of their row, a block at a time.

Row i of the published matrix is column i of the distances between all images, queries first, squared or not and divided
by its maximum. Nothing but that maximum needs all pairs: it is found first, and from then on any single distance or
block of rows can be had without the rest. Three sources offer the same:

    num_query, device
    ranking(k)               (n, k) int64, twice: nearest first, of equal ones the row itself, then the lower index; and
                             of equal ones the lower index, the row itself no exception, which copies have in common
    pairs(row, column)       float64: these pairs
    to_gallery(first, last)  (last - first, G) float64: these queries against the gallery
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Search = Callable[..., tuple[Tensor, Tensor]]  # as :func:`fastreid_u.knn`

_TILE = 2048  # float64 rows against rows: 32 MB
_LEAST_ROWS, _FOUND = 1024, 8  # rows from which the farthest are searched for; how many are measured of each
_BLOCK = 2**22  # entries of a temporary: 32 MB of float64
_CACHED = 2**17  # 1 MB


class FromFeatures:
    """Distances between the rows of ``query`` and ``gallery`` (n, D) in all, each to ``power``, over its row's largest.

    Memory: the rows three times (and the neighbours of ``search``), and blocks. Differences that matter are summed in
    float64: the largest are found by ``search`` too, and where that proves nothing, as among many copies, or rows are
    few, by products of matrices in float64, every tile used for both its rows and its columns.
    """

    def __init__(self, query: Tensor, gallery: Tensor, distance: str, search: Search, power: int = 2) -> None:
        self.num_query, self.device, self.search = len(query), query.device, search
        self.x = torch.cat([query, gallery])
        if distance == "cosine":  # half the squared distance of unit rows, and the half cancels
            self.x = _unit(self.x)
        self.power = power / 2 if distance == "euclidean" else power  # of the squared distance
        self.centre = self.x.mean(dim=0, dtype=torch.float64)  # distances stay, products lose less
        self.norm = torch.cat([rows.square_().sum(dim=1) for rows in self._tiles(0)])
        self.scale = self._scale()

    def ranking(self, k: int) -> tuple[Tensor, Tensor]:
        sq_dist, index = self.search(self.x, k)
        if k == 1:
            return index, index
        # of copies, the one of the lowest index has none before it: its list is by index, and it is the list of all
        own = torch.arange(len(index), device=index.device)
        first = torch.where(sq_dist[:, 1] == 0, torch.minimum(index[:, 1], own), own)
        return index, index[first]

    def pairs(self, row: Tensor, column: Tensor) -> Tensor:
        return (self._sq_dist(row, column) * self.scale[row]) ** self.power

    def _sq_dist(self, row: Tensor, column: Tensor) -> Tensor:
        if not row.is_cuda:
            from fastreid_u.cpu.rerank import measure

            given = (array.numpy() for array in (self.x.contiguous(), row, column))
            return torch.from_numpy(measure(*given, threads=torch.get_num_threads()))
        sq_dist = torch.empty(len(row), dtype=torch.float64, device=self.x.device)
        step = max(1, _BLOCK // max(1, self.x.shape[1]))
        for out, i, j in zip(sq_dist.split(step), row.split(step), column.split(step), strict=True):
            torch.sum((self.x[i].double() - self.x[j].double()).square_(), dim=1, out=out)
        return sq_dist

    def to_gallery(self, first: int, last: int) -> Tensor:
        own = self.x[first:last].double() - self.centre
        sq_dist = torch.empty(last - first, len(self.x) - self.num_query, dtype=torch.float64, device=own.device)
        for out, rows, norm in zip(
            sq_dist.split(_TILE, dim=1),
            self._tiles(self.num_query),
            self.norm[self.num_query :].split(_TILE),
            strict=True,
        ):
            torch.addmm(norm, own, rows.T, alpha=-2, out=out)
        for part, norm, scale in in_step(sq_dist, self.norm[first:last, None], self.scale[first:last, None]):
            part.add_(norm).clamp_(min=0).mul_(scale).pow_(self.power)
        return sq_dist

    def _scale(self) -> Tensor:
        """(n,) what each row's squared distances are multiplied by."""
        largest = self._farthest()
        return torch.where(largest > 0, largest, 1).reciprocal()

    def _tiles(self, first: int) -> Iterator[Tensor]:
        """Centred rows in float64, a tile at a time; the next one is written over it."""
        room = self.centre.new_empty(min(_TILE, len(self.x) - first), len(self.centre))
        return (room[: len(rows)].copy_(rows).sub_(self.centre) for rows in self.x[first:].split(_TILE))

    def _farthest(self) -> Tensor:
        """(n,) each row's squared distance to the row farthest from it."""
        if len(self.x) < _LEAST_ROWS or not self.norm.any():
            return self._farthest_of_all()
        largest, open_rows = self._farthest_by_search()
        if len(open_rows) > len(self.x) // 4:
            return self._farthest_of_all()
        for rows in open_rows.split(_TILE):
            own, found = self.x[rows].double() - self.centre, largest.new_zeros(len(rows))
            for others, norm in zip(self._tiles(0), self.norm.split(_TILE), strict=True):
                torch.maximum(found, torch.addmm(norm, own, others.T, alpha=-2).amax(dim=1), out=found)
            largest[rows] = (found + self.norm[rows]).clamp_(min=0)
        return largest

    def _farthest_by_search(self) -> tuple[Tensor, Tensor]:
        """The largest distances that a search finds, and the rows for which it cannot prove them to be the largest.

        With H twice the largest squared length, [c_i, 0] and [-c_j, h_j] with h_j^2 = H - 2 |c_j|^2 are at the squared
        distance H + 2 |c_i|^2 - |c_i - c_j|^2: the farthest row is the nearest one there. Both are no longer than H^1/2
        and |c_i|, so that rounding their numbers to float32, and then the squared distance, moves it by less than
        16 u (H + |c_i|^2), u being half an ulp. Where the last row found is farther than the first by more than twice
        that, no row was missed; those within twice that of the first are measured.
        """
        norm, d = self.norm, self.x.shape[1]
        most = 2 * norm.max()
        power = 2.0 ** -math.frexp(float(most.sqrt()))[1]  # exact, and float32 then holds any scale
        query, gallery = self.x.new_zeros(len(norm), d + 1), self.x.new_empty(len(norm), d + 1)
        for own, other, rows in zip(query.split(_TILE), gallery.split(_TILE), self._tiles(0), strict=True):
            own[:, :d] = rows.mul_(power)
            torch.neg(own[:, :d], out=other[:, :d])
        gallery[:, d] = ((most - 2 * norm).clamp_(min=0).sqrt_() * power).to(gallery.dtype)
        sq_dist, index = self.search(query, _FOUND, gallery=gallery)
        moved = 16 * 2.0**-24 * power**2 * (most + norm)
        in_doubt = sq_dist.double() - sq_dist[:, :1].double() <= 2 * moved[:, None]
        row, column = in_doubt.nonzero(as_tuple=True)
        largest = norm.new_zeros(len(norm)).scatter_reduce_(0, row, self._sq_dist(row, index[row, column]), "amax")
        return largest, in_doubt[:, -1].nonzero().flatten()

    def _farthest_of_all(self) -> Tensor:
        """The same, by all distances in float64."""
        largest = torch.zeros_like(self.norm)
        for a, rows in zip(range(0, len(self.x), _TILE), self._tiles(0), strict=True):
            for b, others in zip(range(a, len(self.x), _TILE), self._tiles(a), strict=True):
                sq_dist = torch.addmm(self.norm[b : b + _TILE], rows, others.T, alpha=-2)
                sq_dist += self.norm[a : a + _TILE, None]
                for start, found in ((a, sq_dist.amax(dim=1)), (b, sq_dist.amax(dim=0))):
                    part = largest[start : start + _TILE]
                    torch.maximum(part, found, out=part)
        return largest


class Unscaled(FromFeatures):
    """The squared distances of rows as they are, for neighbourhoods; ``distance`` as it is, to the gallery."""

    def __init__(self, query: Tensor, gallery: Tensor, distance: str, search: Search) -> None:
        super().__init__(query, gallery, distance, search, power=1)
        self.distance = distance

    def pairs(self, row: Tensor, column: Tensor) -> Tensor:
        return self._sq_dist(row, column)

    def to_gallery(self, first: int, last: int) -> Tensor:
        found = super().to_gallery(first, last)
        return found.div_(2) if self.distance == "cosine" else found

    def _scale(self) -> Tensor:
        return torch.ones_like(self.norm)


class FromMatrices:
    """Ready distances (Q, G), (Q, Q) and (G, G) in float32, each to ``power``; they need not be symmetric.

    Adds blocks of rows only.
    """

    def __init__(self, q_g: Tensor, q_q: Tensor, g_g: Tensor, power: int = 2) -> None:
        self.q_g, self.q_q, self.g_g, self.power = q_g, q_q, g_g, power
        self.num_query, self.device = len(q_g), q_g.device
        self.largest = torch.cat([block.amax(dim=1) for _, block in self._blocks()])
        self.largest.masked_fill_(self.largest <= 0, 1)

    def ranking(self, k: int) -> tuple[Tensor, Tensor]:
        found = []
        for first, block in self._blocks():
            block /= self.largest[first : first + len(block), None]
            key = ordered_bits(block) << 32  # one integer a pair; the row itself is number 0
            key += torch.arange(1, key.shape[1] + 1, device=key.device)
            own = torch.arange(len(block), device=key.device)
            own_key = key[own, first + own][:, None]
            by_index = key.topk(k, largest=False).values
            others = by_index.masked_fill(by_index == own_key, torch.iinfo(key.dtype).max)
            own_first = torch.cat([own_key & ~0xFFFFFFFF, others], dim=1).sort(dim=1).values[:, :k] & 0xFFFFFFFF
            own_first = torch.where(own_first == 0, first + own[:, None], own_first - 1)
            found.append((own_first, (by_index & 0xFFFFFFFF) - 1))
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def pairs(self, row: Tensor, column: Tensor) -> Tensor:
        queries = self.num_query
        value = self.q_g.new_empty(len(row))
        for matrix, part, i, j in (
            (self.q_q, (row < queries) & (column < queries), column, row),
            (self.q_g, (row >= queries) & (column < queries), column, row - queries),
            (self.q_g, (row < queries) & (column >= queries), row, column - queries),
            (self.g_g, (row >= queries) & (column >= queries), column - queries, row - queries),
        ):
            value[part] = matrix[i[part], j[part]]
        return (value.pow_(self.power) / self.largest[row]).double()

    def to_gallery(self, first: int, last: int) -> Tensor:
        return (self.q_g[first:last].pow(self.power) / self.largest[first:last, None]).double()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Distances of a run of rows to all images, to ``power``: columns of the published matrix."""
        step = max(1, _BLOCK // sum(self.q_g.shape))
        of_queries = zip(self.q_q.T.split(step), self.q_g.split(step), strict=True)
        of_gallery = zip(self.q_g.T.split(step), self.g_g.T.split(step), strict=True)
        first = 0
        for part in itertools.chain(of_queries, of_gallery):
            block = torch.cat(part, dim=1).pow_(self.power)
            yield first, block
            first += len(block)


def in_step(matrix: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Runs of rows of all of them, so few on a CPU that what is done to one after another stays in the cache."""
    step = max(1, (_BLOCK if matrix.is_cuda else _CACHED) // max(1, matrix.shape[1]))
    return zip(*(rows.split(step) for rows in (matrix, *others)), strict=True)


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length. Zeros have no direction: they get one of their own, at right angles to every other row."""
    lost = (x == 0).all(dim=1, keepdim=True)
    return torch.cat([F.normalize(x, dim=1), lost.float()], dim=1)


def ordered_bits(x: Tensor) -> Tensor:
    """int64 within 32 bits, in the order of the float32 numbers; the two zeros are one."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()

# SPDX-License-Identifier: Apache-2.0
"""The distances that re-ranking compares, squared and divided by the largest of their row, a block at a time.

Row i of the published matrix is column i of the distances between all images, queries first, squared or not and divided
by its maximum. Nothing but that maximum needs all pairs: it is found in one pass over tiles, and from then on any
single distance or block of rows can be had without the rest. Three sources offer the same:

    num_query, device
    ranking(k)               (n, k) int64: nearest first, of equal ones the row itself, then the lower index
    pairs(row, column)       float64: these pairs
    to_gallery(first, last)  (last - first, G) float64: these queries against the gallery
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # as :func:`fastreid_u.knn`

_TILE = 2048  # float64 rows against rows: 32 MB
_BLOCK = 2**22  # entries of a temporary: 32 MB of float64


class FromFeatures:
    """Distances between the rows of ``query`` and ``gallery`` (n, D) in all, each to ``power``, over its row's largest.

    Memory: the rows once more (and the neighbours of ``search``), and blocks. Differences that matter are summed in
    float64: the largest by products of matrices (one dgemm of n^2 D multiplications, every tile used for both its
    rows and its columns), those of pairs directly.
    """

    def __init__(self, query: Tensor, gallery: Tensor, distance: str, search: Search, power: int = 2) -> None:
        self.num_query, self.device, self.search = len(query), query.device, search
        self.x = torch.cat([query, gallery])
        if distance == "cosine":  # half the squared distance of unit rows, and the half cancels
            self.x = _unit(self.x)
        self.power = power / 2 if distance == "euclidean" else power  # of the squared distance
        self.centre = self.x.mean(dim=0, dtype=torch.float64)  # distances stay, products lose less
        self.norm = torch.cat([rows.square().sum(dim=1) for rows in self._tiles(0)])
        self.scale = self._scale()

    def ranking(self, k: int) -> Tensor:
        return self.search(self.x, k)[1]

    def pairs(self, row: Tensor, column: Tensor) -> Tensor:
        return (self._sq_dist(row, column) * self.scale[row]) ** self.power

    def _sq_dist(self, row: Tensor, column: Tensor) -> Tensor:
        sq_dist = torch.empty(len(row), dtype=torch.float64, device=self.x.device)
        step = max(1, (_BLOCK if row.is_cuda else 2**17) // max(1, self.x.shape[1]))
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
        sq_dist.add_(self.norm[first:last, None]).clamp_(min=0).mul_(self.scale[first:last, None])
        return sq_dist.pow_(self.power)

    def _scale(self) -> Tensor:
        """(n,) what each row's squared distances are multiplied by."""
        largest = self._farthest()
        return torch.where(largest > 0, largest, 1).reciprocal()

    def _tiles(self, first: int) -> Iterator[Tensor]:
        return (rows.double() - self.centre for rows in self.x[first:].split(_TILE))

    def _farthest(self) -> Tensor:
        """(n,) each row's squared distance to the row farthest from it."""
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

    def ranking(self, k: int) -> Tensor:
        found = []
        for first, block in self._blocks():
            block /= self.largest[first : first + len(block), None]
            key = ordered_bits(block) << 32  # one integer a pair; the row itself is number 0
            key += torch.arange(1, key.shape[1] + 1, device=key.device)
            own = torch.arange(len(block), device=key.device)
            key[own, first + own] &= ~0xFFFFFFFF
            number = key.topk(k, largest=False).values & 0xFFFFFFFF
            found.append(torch.where(number == 0, first + own[:, None], number - 1))
        return torch.cat(found)

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


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length. Zeros have no direction: they get one of their own, at right angles to every other row."""
    lost = (x == 0).all(dim=1, keepdim=True)
    return torch.cat([F.normalize(x, dim=1), lost.float()], dim=1)


def ordered_bits(x: Tensor) -> Tensor:
    """int64 within 32 bits, in the order of the float32 numbers; the two zeros are one."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()

# SPDX-License-Identifier: Apache-2.0
"""Sparse rows, compressed, and what every file here does with them: look columns up, sort them, invert rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._threads import kernel, over_rows
from .measure import ascend


class Rows(NamedTuple):
    """N sparse rows, compressed.

    Attributes:
        indptr: (N + 1,) int64.
        column: (nnz,) int32.
        mass: (nnz,) int32 in fixed point, else float32.
    """

    indptr: np.ndarray
    column: np.ndarray
    mass: np.ndarray

    @classmethod
    def put_together(cls, parts: list[tuple], dtype: type = np.int32) -> Rows:
        """Blocks of rows as one; empties ``parts``, so that no more than one of the large arrays exists twice.

        ``dtype``: of the masses, should there be no block.
        """
        if not parts:
            return cls(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, dtype))
        indptrs, columns, masses = map(list, zip(*parts, strict=True))
        parts.clear()
        count = np.concatenate([np.diff(indptr) for indptr in indptrs])
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
        return cls(indptr, _concatenate(columns), _concatenate(masses))


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    whole, at = np.empty(sum(map(len, arrays)), arrays[0].dtype), 0
    arrays.reverse()
    while arrays:
        part = arrays.pop()
        whole[at : at + len(part)] = part
        at += len(part)
    return whole


def bits(k2: int) -> int:
    """w for which k2 rows of weight 2^w fit an int32 sum: 28 up to k2 = 7, 24 up to 127."""
    return min(28, 31 - k2.bit_length())


def row_weight(k2: int) -> int:
    """What a row in fixed point adds up to after query expansion over k2 rows."""
    return k2 << bits(k2)


@kernel
def table_bits(entries):
    """log2 of the slots of a hash table that ``entries`` keys fill at most by half."""
    size = 3
    while (1 << size) < 2 * entries:
        size += 1
    return size


@kernel
def find_slot(keys, key):
    """The slot of ``key``, or the empty one (-1) where it belongs: multiplicative hashing, then the next free slot."""
    mask = len(keys) - 1
    slot = (((key * 2654435769) & 0xFFFFFFFF) * len(keys)) >> 32  # the upper bits of the product
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@kernel
def _rename(begin, end, indptr, column, mass, name):
    """Replace columns by their names and sort each row by them, in place."""
    widest = 0
    for i in range(begin, end):
        widest = max(widest, indptr[i + 1] - indptr[i])
    key = np.empty(widest, np.int64)
    old = np.empty(widest, mass.dtype)
    for i in range(begin, end):
        first, count = indptr[i], indptr[i + 1] - indptr[i]
        for p in range(count):
            key[p] = (np.int64(name[column[first + p]]) << 32) | p
            old[p] = mass[first + p]
        ascend(key[:count])
        for p in range(count):
            column[first + p] = key[p] >> 32
            mass[first + p] = old[key[p] & 0xFFFFFFFF]


def sort_rows(rows: Rows, name: np.ndarray, threads: int) -> None:
    """Columns become ``name[column]``, ``name`` (N,) int32, and ascend within each row; in place."""
    over_rows(_rename, len(rows.indptr) - 1, threads, *rows, name)


@kernel
def _count_entries(begin, end, indptr, column, stop, count):
    for i in range(begin, end):
        for e in range(indptr[i], stop[i]):
            count[column[e]] += 1


@kernel
def _fill_lists(begin, end, indptr, column, mass, stop, at, row, list_mass):
    for i in range(begin, end):
        for e in range(indptr[i], stop[i]):
            c = column[e]
            row[at[c]], list_mass[at[c]] = i, mass[e]
            at[c] += 1


def invert(rows: Rows, stop: np.ndarray, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each column the rows ``first .. N - 1`` that hold it before their ``stop`` (N,) int64.

    Returns ``(start, row, list_mass)``: where each column's list begins, (N + 1,) int64; and its rows, ascending, with
    the mass of the column in each, int32 both.
    """
    n = len(rows.indptr) - 1
    count = np.zeros(n, np.int64)
    _count_entries(first, n, rows.indptr, rows.column, stop, count)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    row, list_mass = np.empty(start[-1], np.int32), np.empty(start[-1], np.int32)
    _fill_lists(first, n, *rows, stop, start[:-1].copy(), row, list_mass)
    return start, row, list_mass

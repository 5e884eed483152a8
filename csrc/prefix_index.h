// SPDX-License-Identifier: Apache-2.0
// Rows of integers that weigh W each, and which of them can be near: their overlap T, the sum of minima over shared
// columns, reaches `need`. Integers, so that T is the same in any order and no rounding decides a pair.
//
// Order columns by how many rows hold them, rare first. A row's prefix is its shortest head (columns that equally many
// rows hold stay together) whose tail weighs at most `tail`. Take two rows and let a be where the earlier prefix ends:
// what they share up to a is in both prefixes, the rest in the tail of the row whose prefix ends at a. So rows that
// overlap by `need` overlap by need - tail within their prefixes. Only prefixes are listed by column: that keeps hubs,
// which come last in every row, out of the lists, and most strangers from meeting at all.
#pragma once

#include "api.h"
#include "scan.h"
#include "table.h"

namespace fastreid_u {

struct Rows {
  const int64_t* indptr;  // [n + 1]
  const int32_t* column;  // [nnz] ascending within a row
  const int32_t* mass;    // [nnz] positive
  int64_t n;

  // Do rows i and j overlap by `need`? They share at most what they weigh, `weight`. All members get the answer.
  template <class Team>
  FU_HD bool near(int64_t i, int64_t j, int64_t need, int64_t weight, Team team) const {
    int64_t p = indptr[i] + team.rank, q = indptr[j];
    const int64_t p_end = indptr[i + 1], q_end = indptr[j + 1];
    int64_t shared = 0;
    if constexpr (Team::size == 1) {  // one thread merges, and stops when the answer is settled
      int64_t spare = weight - need;  // what row i may hold alone
      while (p < p_end && q < q_end && shared < need && spare >= 0) {
        const int32_t a = column[p], b = column[q], own = mass[p];
        shared += a == b ? (own < mass[q] ? own : mass[q]) : 0;
        spare -= a < b ? own : 0;
        p += a <= b;
        q += b <= a;
      }
    } else {  // each member looks its columns up
      for (; p < p_end; p += team.size) {
        const int32_t wanted = column[p];
        for (int64_t end = q_end; q < end;) {
          const int64_t middle = q + (end - q) / 2;
          if (column[middle] < wanted) {
            q = middle + 1;
          } else {
            end = middle;
          }
        }
        if (q < q_end && column[q] == wanted) shared += mass[p] < mass[q] ? mass[p] : mass[q];
      }
    }
    return team.sum(shared) >= need;
  }
};

struct Index {
  Rows rows;
  int32_t* holders;  // [n] rows that hold a column
  int32_t* limit;    // [n] a row's prefix: its columns with at most so many holders
  int64_t* start;    // [n + 1] of each column's list
  int64_t* list;     // [nnz] row << 32 | mass, in any order within a list

  // Calls visit(j, shared, team) with every other row j for which use_row(j), once, and what i and j share in their
  // prefixes in columns for which use_column(c). Members see all rows of one range, then those of the next; between
  // ranges it ends if stop().
  template <class Crew, class UseColumn, class UseRow, class Visit, class Stop>
  FU_HD void each_met(int64_t i, Crew crew, Table table, UseColumn use_column, UseRow use_row, Visit visit,
                      Stop stop) const {
    int64_t width = rows.n;
    for (int64_t begin = 0; begin < rows.n;) {
      const int64_t end = rows.n - begin < width ? rows.n : begin + width;
      for (int64_t p = rows.indptr[i] + crew.number; p < rows.indptr[i + 1]; p += crew.count) {
        const int32_t c = rows.column[p], own = rows.mass[p];
        if (holders[c] > limit[i] || !use_column(c) || table.full(crew)) continue;
        const int64_t list_end = start[c + 1];
        for (int64_t e = start[c] + crew.team.rank; e < list_end; e += crew.team.size) {
          const int64_t j = list[e] >> 32;
          const int32_t mass = static_cast<int32_t>(list[e] & 0xffffffff);
          if (j >= begin && j < end && j != i && use_row(j)) {
            table.meet(crew, static_cast<int32_t>(j), own < mass ? own : mass);
          }
        }
      }
      crew.sync();
      const bool whole = !table.full(crew);
      const int64_t met = whole ? crew.read(table.met) : 0;
      for (int64_t s = crew.number; s < met; s += crew.count) {
        const Slot slot = table.slots[table.used[s]];
        visit(slot.row, slot.shared, crew.team);
      }
      table.clear(crew);
      if (whole) {
        if (stop()) return;
        begin = end;
        width *= 2;
      } else {
        width = (end - begin + 1) / 2;  // one row always fits
      }
    }
  }
};

struct ClearIndex {
  Index index;
  FU_HD void operator()(int64_t c) const {
    index.holders[c] = 0;
    index.start[c + 1] = 0;
    if (c == 0) index.start[0] = 0;
  }
};

struct CountHolders {
  Index index;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    const Rows& rows = index.rows;
    for (int64_t p = rows.indptr[i] + team.rank; p < rows.indptr[i + 1]; p += team.size) {
      add_relaxed(index.holders + rows.column[p], 1);
    }
  }
};

// The smallest limit beyond which a row weighs at most `tail`, by bisection; start[c + 1] counts the list of column c.
struct FindPrefix {
  Index index;
  int64_t tail;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    const Rows& rows = index.rows;
    const int64_t begin = rows.indptr[i] + team.rank, end = rows.indptr[i + 1];
    int64_t* const held = index.list;  // not in use yet: holders << 32 | mass, side by side
    int32_t low = 0, high = 0;
    for (int64_t p = begin; p < end; p += team.size) {
      const int32_t holders = index.holders[rows.column[p]];
      held[p] = static_cast<int64_t>(holders) << 32 | rows.mass[p];
      high = holders > high ? holders : high;
    }
    high = static_cast<int32_t>(team.most(high));
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      int64_t beyond = 0;
      for (int64_t p = begin; p < end; p += team.size) beyond += held[p] >> 32 > middle ? held[p] & 0xffffffff : 0;
      if (team.sum(beyond) <= tail) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    if (team.leader) index.limit[i] = low;
    for (int64_t p = begin; p < end; p += team.size) {
      if (held[p] >> 32 <= low) add_relaxed(index.start + rows.column[p] + 1, 1);
    }
  }
};

struct ListSize {
  const int64_t* start;
  FU_HD int64_t operator()(int64_t c) const { return start[c + 1]; }
};

// start[c + 1] is where list c begins, and moves on to where it ends.
struct FillLists {
  Index index;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    const Rows& rows = index.rows;
    for (int64_t p = rows.indptr[i] + team.rank; p < rows.indptr[i + 1]; p += team.size) {
      const int32_t c = rows.column[p];
      if (index.holders[c] > index.limit[i]) continue;
      index.list[add_relaxed(index.start + c + 1, 1)] = i << 32 | rows.mass[p];
    }
  }
};

// `sums`: scratch of kMaxRuns words.
template <class Executor>
void build_index(Executor& run, Index index, int64_t tail, int64_t* sums) {
  const int64_t n = index.rows.n;
  run.each(n, ClearIndex{index});
  run.each_row(n, CountHolders{index});
  run.each_row(n, FindPrefix{index, tail});
  sum_before(run, n, ListSize{index.start}, index.start + 1, sums);
  run.each_row(n, FillLists{index});
}

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// Lock-free union-find whose roots are the smallest member of their set, whatever the order of the unions.
//
// Method: hooking by compare-and-swap with path halving, as in Jayanti & Tarjan, "A Randomized Concurrent Algorithm for
// Disjoint Set Union", PODC 2016, with the index itself as the priority (Jaiganesh & Burtscher, "A High-Performance
// Connected Components Implementation for GPUs", HPDC 2018).
//
// Why it is right under races. Two invariants hold at every instant:
//   1. parent[x] <= x, with equality exactly at roots. Hence no cycle, and a root is the minimum of its tree.
//   2. Once x is not a root it never becomes one again, and everything ever stored in parent[x] is an ancestor of x.
// `unite` changes only roots: its compare-and-swap succeeds only while parent[hi] == hi, so of two threads that hook the
// same root one loses, sees a non-root and starts again from the new ancestors. Path halving writes only non-roots, and
// only an ancestor that it has read; a slower thread may put back an older ancestor, which lengthens a path and loses no
// link. So a find ends (indices strictly decrease), and two elements share a root iff a chain of unions joins them.
#pragma once

#include "atomics.h"

namespace fastreid_u {

// The root of x, halving the path on the way. Safe beside other `find_root` and `unite` calls.
FU_HD int64_t find_root(int64_t* parent, int64_t x) {
  int64_t up = load_relaxed(parent + x);
  while (up != x) {
    const int64_t upper = load_relaxed(parent + up);
    if (upper != up) store_relaxed(parent + x, upper);
    x = up;
    up = upper;
  }
  return x;
}

// Puts a and b into one set. Safe beside other `find_root` and `unite` calls.
FU_HD void unite(int64_t* parent, int64_t a, int64_t b) {
  while (true) {
    a = find_root(parent, a);
    b = find_root(parent, b);
    if (a == b) return;
    const int64_t hi = a > b ? a : b;
    const int64_t lo = a > b ? b : a;
    if (compare_and_swap(parent + hi, hi, lo)) return;
  }
}

// Lets parent[x] be the root itself. Safe beside other `flatten` calls only: it must not halve the paths of others, or a
// slower thread could put an older ancestor back over a finished entry; and no `unite` may run, or the root moves on.
FU_HD void flatten(int64_t* parent, int64_t x) {
  int64_t root = x;
  for (int64_t up = load_relaxed(parent + root); up != root; up = load_relaxed(parent + root)) root = up;
  store_relaxed(parent + x, root);
}

}  // namespace fastreid_u

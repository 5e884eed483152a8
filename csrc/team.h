// SPDX-License-Identifier: Apache-2.0
// Who works on one row.
//
// A team is a single host thread or the 32 lanes of a warp. It has `rank`, `size`, `leader`, and `sum`, `most` and `any`,
// which give every member the same answer; members stride over the row, so a warp reads neighbouring words together.
//
// A crew is what shares one table: a single host thread or all warps of a block. Each member is `rank` of `size` in the
// crew, and in `team`, which is team `number` of `count`. `sync` waits for all and shows them what all wrote; `read`,
// `claim` and `add` act on words of the table as one step.
#pragma once

#include "atomics.h"

namespace fastreid_u {

struct SerialTeam {
  static constexpr int64_t rank = 0, size = 1;
  static constexpr bool leader = true;
  FU_HD int64_t sum(int64_t x) const { return x; }
  FU_HD int64_t most(int64_t x) const { return x; }
  FU_HD bool any(bool x) const { return x; }
};

struct SerialCrew {
  static constexpr int64_t rank = 0, size = 1, number = 0, count = 1;
  static constexpr bool leader = true;
  SerialTeam team;
  FU_HD void sync() const {}
  FU_HD int32_t read(const int32_t* p) const { return *p; }
  // Puts `desired` where `expected` was; returns what was there.
  FU_HD int32_t claim(int32_t* p, int32_t expected, int32_t desired) const {
    const int32_t before = *p;
    if (before == expected) *p = desired;
    return before;
  }
  FU_HD int32_t add(int32_t* p, int32_t x) const {
    const int32_t before = *p;
    *p = before + x;
    return before;
  }
};

}  // namespace fastreid_u

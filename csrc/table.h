// SPDX-License-Identifier: Apache-2.0
// A hash table of rows and what they share, filled by a crew: in a block's shared memory or a host thread's cache.
//
// Linear probing of at most half the slots. It can be full; the crew that fills it then takes the rows a range at a
// time. Between uses all slots are free.
#pragma once

#include "team.h"

namespace fastreid_u {

struct Slot {
  int32_t row;  // kFree: none
  int32_t shared;
};

constexpr int32_t kFree = -1;

struct Table {
  Slot* slots;        // [1 << log2_size]
  int32_t* used;      // [1 << log2_size - 1] the slots that are not free
  int32_t* met;       // how many those are; if more than there is room for, `used` misses some
  int32_t* found;     // a count for the caller
  int32_t log2_size;  // two slots at least for every member of the crew, so that one always stays free

  FU_HD int32_t room() const { return 1 << (log2_size - 1); }

  template <class Crew>
  FU_HD bool full(Crew crew) const {
    return crew.read(met) >= room();
  }

  // Adds `mass` to what `row` shares, or leaves a new row out and the table full.
  template <class Crew>
  FU_HD void meet(Crew crew, int32_t row, int32_t mass) const {
    const uint32_t last = (1u << log2_size) - 1;
    uint32_t at = static_cast<uint32_t>(row) * 2654435769u >> (32 - log2_size);
    if constexpr (Crew::size == 1) {  // without a branch on whether the row is new, which no processor can foretell
      while (slots[at].row != row && slots[at].row != kFree) at = (at + 1) & last;
      if (*met >= room()) return;
      used[*met] = static_cast<int32_t>(at);
      *met += slots[at].row == kFree;
      slots[at] = {row, slots[at].shared + mass};
    } else {
      while (true) {
        int32_t seen = crew.read(&slots[at].row);
        if (seen == kFree) {
          if (full(crew)) return;  // of those who pass here at once, each brings one row more
          seen = crew.claim(&slots[at].row, kFree, row);
          if (seen == kFree) {
            const int32_t place = crew.add(met, 1);
            if (place < room()) used[place] = static_cast<int32_t>(at);
            seen = row;
          }
        }
        if (seen == row) break;
        at = (at + 1) & last;
      }
      crew.add(&slots[at].shared, mass);
    }
  }

  // Waits for all members and frees every slot; afterwards the table may be filled again at once.
  template <class Crew>
  FU_HD void clear(Crew crew) const {
    crew.sync();
    const int32_t many = crew.read(met);
    const bool listed = many <= room();
    const int32_t end = listed ? many : 1 << log2_size;
    for (int32_t s = static_cast<int32_t>(crew.rank); s < end; s += static_cast<int32_t>(crew.size)) {
      slots[listed ? used[s] : s] = Slot{kFree, 0};
    }
    crew.sync();  // all have read `met`
    if (crew.leader) *met = 0;
    crew.sync();
  }
};

}  // namespace fastreid_u

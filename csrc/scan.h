// SPDX-License-Identifier: Apache-2.0
// Running sums over points, in at most kMaxRuns runs of consecutive points, one worker each: sum the runs, sum the sums,
// walk the runs again.
#pragma once

#include "atomics.h"

namespace fastreid_u {

constexpr int64_t kMaxRuns = 1024;

// Run r of `runs` holds the points [n * r / runs, n * (r + 1) / runs). `size(i)` is read again after `before` was
// written for smaller points of the run, so both may live in one place.
template <class Size>
struct SumRun {
  Size size;
  int64_t* sums;  // [runs]
  int64_t n, runs;
  FU_HD void operator()(int64_t r) const {
    int64_t sum = 0;
    for (int64_t i = n * r / runs; i < n * (r + 1) / runs; ++i) sum += size(i);
    sums[r] = sum;
  }
};

struct SumSums {
  int64_t* sums;
  int64_t runs;
  FU_HD void operator()(int64_t) const {
    int64_t before = 0;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t sum = sums[r];
      sums[r] = before;
      before += sum;
    }
  }
};

template <class Size>
struct WalkRun {
  SumRun<Size> run;
  int64_t* before;  // [n]
  FU_HD void operator()(int64_t r) const {
    int64_t sum = run.sums[r];
    for (int64_t i = run.n * r / run.runs; i < run.n * (r + 1) / run.runs; ++i) {
      const int64_t size = run.size(i);
      before[i] = sum;
      sum += size;
    }
  }
};

// before[i] = size(0) + ... + size(i - 1). `sums` is scratch of kMaxRuns words.
template <class Executor, class Size>
void sum_before(Executor& run, int64_t n, Size size, int64_t* before, int64_t* sums) {
  const SumRun<Size> part{size, sums, n, n < kMaxRuns ? n : kMaxRuns};
  run.each(part.runs, part);
  run.each(1, SumSums{sums, part.runs});
  run.each(part.runs, WalkRun<Size>{part, before});
}

}  // namespace fastreid_u

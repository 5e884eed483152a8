// SPDX-License-Identifier: Apache-2.0
// Runs the phases of dbscan.h and pseudo_labels.h on host threads. std::thread, not OpenMP: no second thread pool beside
// the one that torch brings, and thread sanitizer understands it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "table.h"

namespace fastreid_u {

// A table with the memory that it stands in.
class HostTable {
 public:
  explicit HostTable(int32_t log2_size)
      : slots_(size_t{1} << log2_size, Slot{kFree, 0}), used_(size_t{1} << (log2_size - 1)), log2_size_(log2_size) {}
  Table view() { return {slots_.data(), used_.data(), &met_, &found_, log2_size_}; }

 private:
  std::vector<Slot> slots_;
  std::vector<int32_t> used_;
  int32_t met_ = 0, found_ = 0, log2_size_;
};

class HostExecutor {
 public:
  // `grain`: points handed out at a time; a phase of no more than that runs on the calling thread. `log2_table`: slots of
  // a table; this many fit a core's own cache and hold the rows that all but hubs meet.
  explicit HostExecutor(int threads, int64_t grain = 256, int32_t log2_table = 14)
      : threads_(std::max(threads, 1)), grain_(grain), log2_table_(log2_table) {}

  template <class F>
  void each(int64_t n, F f) {
    spread(n, threads_, [&f](int64_t i, int64_t) { f(i); });
  }

  template <class F>
  void each_row(int64_t n, F f) {
    spread(n, threads_, [&f](int64_t i, int64_t) { f(i, SerialTeam{}); });
  }

  template <class F>
  void each_crew(int64_t n, F f) {
    const int64_t workers = std::clamp<int64_t>((n + grain_ - 1) / grain_, 1, threads_);
    std::vector<HostTable> tables(static_cast<size_t>(workers), HostTable(log2_table_));
    spread(n, workers, [&](int64_t i, int64_t t) { f(i, SerialCrew{}, tables[static_cast<size_t>(t)].view()); });
  }

  int64_t read(const int64_t* p) const { return *p; }
  void write(int64_t* p, int64_t value) const { *p = value; }
  void wait() const {}  // each phase has

 private:
  // f(i, worker) for all i below n.
  template <class F>
  void spread(int64_t n, int64_t workers, F f) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t t) {
      for (int64_t begin; (begin = next.fetch_add(grain_, std::memory_order_relaxed)) < n;) {
        const int64_t end = std::min(begin + grain_, n);
        for (int64_t i = begin; i < end; ++i) f(i, t);
      }
    };
    const int64_t grains = (n + grain_ - 1) / grain_;
    std::vector<std::thread> helpers;
    for (int64_t t = 1; t < std::min<int64_t>(workers, grains); ++t) {
      try {
        helpers.emplace_back(work, t);
      } catch (const std::system_error&) {
        break;  // the system gives no more threads; those that run, this one at least, do all the work
      }
    }
    work(0);
    for (std::thread& helper : helpers) helper.join();
  }

  int threads_;
  int64_t grain_;
  int32_t log2_table_;
};

}  // namespace fastreid_u

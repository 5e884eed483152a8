// SPDX-License-Identifier: Apache-2.0
// Runs the phases of dbscan.h on host threads. std::thread, not OpenMP: no second thread pool beside the one that torch
// brings, and thread sanitizer understands it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "graph.h"

namespace fastreid_u {

class HostExecutor {
 public:
  // `grain`: points handed out at a time; a phase of no more than that runs on the calling thread.
  explicit HostExecutor(int threads, int64_t grain = 256) : threads_(std::max(threads, 1)), grain_(grain) {}

  template <class F>
  void each(int64_t n, F f) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t begin; (begin = next.fetch_add(grain_, std::memory_order_relaxed)) < n;) {
        const int64_t end = std::min(begin + grain_, n);
        for (int64_t i = begin; i < end; ++i) f(i);
      }
    };
    const int64_t grains = (n + grain_ - 1) / grain_;
    std::vector<std::thread> helpers;
    for (int64_t t = 1; t < std::min<int64_t>(threads_, grains); ++t) {
      try {
        helpers.emplace_back(work);
      } catch (const std::system_error&) {
        break;  // the system gives no more threads; those that run, this one at least, do all the work
      }
    }
    work();
    for (std::thread& helper : helpers) helper.join();
  }

  template <class F>
  void each_row(int64_t n, F f) {
    each(n, [&f](int64_t i) { f(i, SerialTeam{}); });
  }

  int64_t read(const int64_t* p) const { return *p; }
  void write(int64_t* p, int64_t value) const { *p = value; }

 private:
  int threads_;
  int64_t grain_;
};

}  // namespace fastreid_u

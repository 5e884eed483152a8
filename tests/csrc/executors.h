// SPDX-License-Identifier: Apache-2.0
// Executors that deal the core's work out as a GPU does, on threads, so that a sanitizer sees every race.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#include "../../csrc/host_executor.h"

namespace {

namespace fu = fastreid_u;

// Deals the points out in turn and starts all threads together, so that each does its share of every phase, however short.
struct StridedExecutor {
  template <class F>
  void each(int64_t n, F f) {
    constexpr int kThreads = 4;
    std::barrier start(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        start.arrive_and_wait();
        for (int64_t i = t; i < n; i += kThreads) f(i);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  template <class F>
  void each_row(int64_t n, F f) {
    each(n, [&f](int64_t i) { f(i, fu::SerialTeam{}); });
  }
  template <class F>
  void each_crew(int64_t n, F f) {
    fu::HostExecutor(4, 1, log2_table).each_crew(n, f);
  }
  int64_t read(const int64_t* p) const { return *p; }
  void write(int64_t* p, int64_t value) const { *p = value; }
  int32_t log2_table = 14;
};

// What a GPU does, on threads: a crew of two teams of two, which share a small table. A member that forgets to wait for
// the others is a data race.
struct PairTeam {
  static constexpr int64_t size = 2;
  int64_t rank;
  bool leader;
  std::barrier<>* both;
  int64_t* words;  // [2] shared
  template <class Join>
  int64_t join(int64_t x, Join f) const {
    words[rank] = x;
    both->arrive_and_wait();
    const int64_t joined = f(words[0], words[1]);
    both->arrive_and_wait();
    return joined;
  }
  int64_t sum(int64_t x) const { return join(x, [](int64_t a, int64_t b) { return a + b; }); }
  int64_t most(int64_t x) const { return join(x, [](int64_t a, int64_t b) { return std::max(a, b); }); }
  bool any(bool x) const { return most(x) != 0; }
};

struct PairsCrew {
  static constexpr int64_t size = 4, count = 2;
  int64_t rank, number;
  bool leader;
  PairTeam team;
  std::barrier<>* all;
  void sync() const { all->arrive_and_wait(); }
  int32_t read(const int32_t* p) const { return __atomic_load_n(p, __ATOMIC_RELAXED); }
  int32_t claim(int32_t* p, int32_t expected, int32_t desired) const {
    std::this_thread::yield();
    __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
  }
  int32_t add(int32_t* p, int32_t x) const { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
};

struct CrewExecutor {
  int32_t log2_table = 3;  // the least that four members may fill
  template <class Work>
  void crew(Work work) {
    std::barrier<> all(4), first(2), second(2);
    int64_t words[4] = {};
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        work(PairsCrew{t, t / 2, t == 0, {t % 2, t % 2 == 0, t < 2 ? &first : &second, words + t / 2 * 2}, &all});
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  template <class F>
  void each(int64_t n, F f) {
    StridedExecutor().each(n, f);
  }
  template <class F>
  void each_row(int64_t n, F f) {
    crew([&](const PairsCrew& member) {
      for (int64_t i = member.number; i < n; i += 2) f(i, member.team);
    });
  }
  template <class F>
  void each_crew(int64_t n, F f) {
    fu::HostTable table(log2_table);
    crew([&](const PairsCrew& member) {
      for (int64_t i = 0; i < n; ++i) f(i, member, table.view());
    });
  }
  int64_t read(const int64_t* p) const { return *p; }
  void write(int64_t* p, int64_t value) const { *p = value; }
};

}  // namespace

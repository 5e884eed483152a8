// SPDX-License-Identifier: Apache-2.0
// The DBSCAN core without Python, for the sanitizers: every phase on several threads against a serial
// depth-first search. tests/test_dbscan_native.py compiles and runs it. With an argument it plants the fault that the
// sanitizer must report, which proves that the sanitizer was looking.
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define FU_LET_OTHERS_IN() std::this_thread::yield()
#include "../../csrc/dbscan.h"
#include "../../csrc/host_executor.h"

namespace fu = fastreid_u;

namespace {

int failures = 0;

void expect(bool ok, const char* what, int trial) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s (trial %d)\n", what, trial);
}

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
  int64_t read(const int64_t* p) const { return *p; }
  void write(int64_t* p, int64_t value) const { *p = value; }
};

struct Case {
  int64_t n;
  double eps;
  int64_t min_samples;
  std::vector<int64_t> indptr;
  std::vector<int32_t> indices;
  std::vector<float> data;   // of the stored entries
  std::vector<float> dense;  // the same graph; what is not stored is 9, on the diagonal 0
};

// Distances on a coarse grid, so that many equal eps; communities, so that there is something to find.
Case random_case(std::mt19937& rng, bool symmetric) {
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  Case c;
  c.n = 1 + static_cast<int64_t>(rng() % 120);
  c.eps = 0.1 * static_cast<double>(1 + rng() % 8);
  c.min_samples = 1 + static_cast<int64_t>(rng() % 5);
  const double density = 0.3 * uniform(rng);
  const int64_t community = 1 + static_cast<int64_t>(rng() % 20);
  c.dense.assign(static_cast<size_t>(c.n * c.n), 9.0f);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      const double chance = i / community == j / community ? 0.5 : 0.1 * density;
      if (i != j && uniform(rng) < chance) c.dense[i * c.n + j] = 0.1f * static_cast<float>(rng() % 10);
    }
    c.dense[i * c.n + i] = rng() % 8 ? 0.0f : 0.9f;
  }
  if (symmetric) {
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = 0; j < i; ++j) c.dense[j * c.n + i] = c.dense[i * c.n + j];
    }
  }
  c.indptr.push_back(0);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      const float d = c.dense[i * c.n + j];
      if (d == 9.0f || (i == j && d == 0.0f && i % 2)) continue;  // half of the zero diagonal is left to the rule
      c.indices.push_back(static_cast<int32_t>(j));
      c.data.push_back(d);
    }
    c.indptr.push_back(static_cast<int64_t>(c.indices.size()));
  }
  return c;
}

std::vector<int64_t> depth_first(const Case& c) {
  const float eps = static_cast<float>(c.eps);
  std::vector<bool> core(c.n);
  for (int64_t i = 0; i < c.n; ++i) {
    int64_t degree = 0;
    for (int64_t j = 0; j < c.n; ++j) degree += c.dense[i * c.n + j] <= eps;
    core[i] = degree >= c.min_samples;
  }
  std::vector<int64_t> labels(c.n, -1);
  int64_t cluster = 0;
  for (int64_t seed = 0; seed < c.n; ++seed) {
    if (!core[seed] || labels[seed] != -1) continue;
    std::vector<int64_t> waiting{seed};
    while (!waiting.empty()) {
      const int64_t i = waiting.back();
      waiting.pop_back();
      if (labels[i] != -1) continue;
      labels[i] = cluster;
      for (int64_t j = 0; core[i] && j < c.n; ++j) {
        if (c.dense[i * c.n + j] <= eps) waiting.push_back(j);
      }
    }
    ++cluster;
  }
  return labels;
}

template <class Executor, class View>
void test_view(Executor run, const Case& c, View view, const std::vector<int64_t>& expected, const char* what,
               int trial) {
  // Exactly as large as asked for, so that the address sanitizer sees one word too many.
  std::vector<int64_t> scratch(fu::Scratch::words(c.n));
  std::vector<int64_t> labels(c.n);
  std::vector<uint8_t> core(c.n);
  expect(fu::check_graph(run, view, scratch.data()) == -1, "a sound graph passes the check", trial);
  fu::dbscan(run, view, c.eps, c.min_samples, labels.data(), core.data(), scratch.data());
  expect(labels == expected, what, trial);
}

void test_dbscan() {
  std::mt19937 rng(7);
  for (int trial = 0; trial < 40; ++trial) {
    const Case c = random_case(rng, trial % 2 == 0);
    const std::vector<int64_t> expected = depth_first(c);
    const int64_t nnz = static_cast<int64_t>(c.data.size());
    const fu::CsrView<float, int32_t> sparse{c.indptr.data(), c.indices.data(), c.data.data(), c.n, nnz};
    const fu::DenseView<float> dense{c.dense.data(), c.n};
    test_view(StridedExecutor(), c, sparse, expected, "sparse labels equal depth-first search", trial);
    test_view(StridedExecutor(), c, dense, expected, "dense labels equal depth-first search", trial);
    test_view(fu::HostExecutor(4, 1), c, sparse, expected, "the same by the executor of the library", trial);
  }
}

// Rows that lie about their extent must be reported, and not be read.
void test_check() {
  const std::vector<int32_t> indices{0, 1};
  const std::vector<float> data{0.0f, 0.0f};
  const std::vector<std::vector<int64_t>> pointers{{0, 1, 3}, {0, -1, 2}, {0, 2, 1}, {1, 1, 2}, {0, 1, 1}};
  for (size_t t = 0; t < pointers.size(); ++t) {
    fu::HostExecutor run(2, 1);
    std::vector<int64_t> scratch(fu::Scratch::words(2));
    const fu::CsrView<float, int32_t> view{pointers[t].data(), indices.data(), data.data(), 2, 2};
    const int64_t code = fu::check_graph(run, view, scratch.data());
    expect(code >= 0 && code % fu::kFaultKinds == fu::kFaultIndptr, "bad row pointers are reported", static_cast<int>(t));
  }
}

// Four threads tie the same few roots together, each link once, over and over: a union that gives up after a lost race
// leaves a set in two pieces. At the end every root must be the smallest member of its set, a residue modulo ten.
void test_union_find() {
  constexpr int64_t n = 80;
  constexpr int kThreads = 4, kRounds = 1000;
  std::vector<int64_t> parent(n);
  std::barrier step(kThreads);
  const auto work = [&](int t) {
    for (int round = 0; round < kRounds; ++round) {
      if (t == 0) std::iota(parent.begin(), parent.end(), 0);
      step.arrive_and_wait();
      for (int64_t k = t; k < n - 10; k += kThreads) {
        const int64_t a = (k * 37 + round) % (n - 10);  // 37 and 70 share no factor: every link once
        fu::unite(parent.data(), a, a + 10);
        fu::find_root(parent.data(), (a * 7) % n);
      }
      step.arrive_and_wait();
      if (t == 0) {
        bool right = true;
        for (int64_t x = 0; x < n; ++x) right &= fu::find_root(parent.data(), x) == x % 10;
        expect(right, "the root of every set is its smallest member", round);
      }
    }
  };
  std::vector<std::thread> helpers;
  for (int t = 1; t < kThreads; ++t) helpers.emplace_back(work, t);
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

[[gnu::noinline]] void plant(const char* fault) {
  if (std::strcmp(fault, "race") == 0) {
    int64_t shared = 0;
    StridedExecutor().each(1000, [&shared](int64_t i) { shared += i; });
    std::printf("%lld\n", static_cast<long long>(shared));
  } else {
    std::vector<int64_t> words(8);
    const int64_t beyond = std::atoi(fault);
    std::printf("%lld\n", static_cast<long long>(words.data()[beyond]));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    plant(argv[1]);
    return 0;
  }
  test_union_find();
  test_check();
  test_dbscan();
  if (failures == 0) std::printf("all passed\n");
  return failures != 0;
}

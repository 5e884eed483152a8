// SPDX-License-Identifier: Apache-2.0
// The DBSCAN core without Python, for the sanitizers: every phase on several threads against a serial
// depth-first search. tests/csrc/test_dbscan.py compiles and runs it. With an argument it plants the fault that the
// sanitizer must report, which proves that the sanitizer was looking.
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define FU_LET_OTHERS_IN() std::this_thread::yield()
#include "../../csrc/host_executor.h"
#include "../../csrc/launch_executor.h"
#include "../../csrc/pseudo_labels.h"
#include "executors.h"

namespace fu = fastreid_u;

namespace {

int failures = 0;

void expect(bool ok, const char* what, int trial) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s (trial %d)\n", what, trial);
}

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

// An encoding with little hubs, bridges and copies, its dense form, and neighbour lists that may say anything.
struct EncodedCase {
  int64_t n, k, min_samples;
  std::vector<int64_t> indptr{0}, need;
  std::vector<int32_t> column, mass, lists;
  std::vector<int64_t> dense;
  static constexpr int64_t weight = 1000;
  fu::Encoding encoding() const {
    return {indptr.data(), column.data(), mass.data(), lists.data(), n, indptr.back(), k, weight};
  }
  int64_t overlap(int64_t i, int64_t j) const {
    int64_t total = 0;
    for (int64_t c = 0; c < n; ++c) total += std::min(dense[i * n + c], dense[j * n + c]);
    return total;
  }
};

EncodedCase random_encoding(std::mt19937& rng) {
  EncodedCase c;
  c.n = 2 + static_cast<int64_t>(rng() % 60);
  c.k = 1 + static_cast<int64_t>(rng() % std::min<int64_t>(c.n, 20));
  c.min_samples = 1 + static_cast<int64_t>(rng() % (rng() % 3 ? 5 : 20));
  const int64_t group = 1 + static_cast<int64_t>(rng() % 12), hubs = 1 + static_cast<int64_t>(rng() % 3);
  const int64_t hub_part = static_cast<int64_t>(rng() % 3) * 300;
  c.dense.assign(static_cast<size_t>(c.n * c.n), 0);
  for (int64_t i = 0; i < c.n; ++i) {
    int64_t* const row = c.dense.data() + i * c.n;
    int64_t left = rng() % 10 ? c.weight : c.weight / 2;  // some rows weigh less
    if (rng() % 20 == 0) left = 0;
    if (i && rng() % 6 == 0) {
      std::copy(row - c.n, row, row);  // a copy
    } else {
      while (left > 0) {
        const bool to_hub = static_cast<int64_t>(rng() % 1000) < hub_part;
        const bool home = rng() % 8 != 0;  // else a bridge to anywhere
        int64_t at = to_hub ? static_cast<int64_t>(rng()) % hubs : static_cast<int64_t>(rng()) % c.n;
        if (!to_hub && home) at = i / group * group + static_cast<int64_t>(rng()) % group;
        at = std::min(at, c.n - 1);
        const int64_t part = std::min<int64_t>(left, 50 * (1 + static_cast<int64_t>(rng() % 5)));
        row[at] += part;
        left -= part;
      }
    }
    for (int64_t j = 0; j < c.n; ++j) {
      if (row[j] == 0) continue;
      c.column.push_back(static_cast<int32_t>(j));
      c.mass.push_back(static_cast<int32_t>(row[j]));
    }
    c.indptr.push_back(static_cast<int64_t>(c.column.size()));
    for (int64_t a = 0; a < c.k; ++a) {  // near ones, anybody, and repeats
      const int64_t j = rng() % 2 ? std::min(c.n - 1, i / group * group + a) : static_cast<int64_t>(rng()) % c.n;
      c.lists.push_back(static_cast<int32_t>(j));
    }
  }
  c.column.shrink_to_fit();  // so that the address sanitizer sees one word too many
  c.need = {571, 1 + static_cast<int64_t>(rng() % 1000), 1000};
  return c;
}

// Who is near whom, who is core, and in how many pieces the cores hang together, by definition.
struct Truth {
  std::vector<char> near, core;
  int64_t pieces = 0;
  Truth(const EncodedCase& c, int64_t need)
      : near(static_cast<size_t>(c.n * c.n)), core(static_cast<size_t>(c.n)) {
    for (int64_t i = 0; i < c.n; ++i) {
      int64_t count = 0;
      for (int64_t j = 0; j < c.n; ++j) count += near[i * c.n + j] = i == j || c.overlap(i, j) >= need;
      core[i] = count >= c.min_samples;
    }
    std::vector<int64_t> parent(static_cast<size_t>(c.n));
    std::iota(parent.begin(), parent.end(), 0);
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        if (core[i] && core[j] && near[i * c.n + j]) fu::unite(parent.data(), i, j);
      }
    }
    for (int64_t i = 0; i < c.n; ++i) pieces += core[i] && parent[i] == i;
  }
};

// What is wrong with labels, whatever algorithm made them.
const char* wrong_with(const EncodedCase& c, const Truth& truth, const int64_t* labels) {
  const auto& [near, core, pieces] = truth;
  int64_t clusters = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    if (core[i] && labels[i] < 0) return "a core is noise";
    if (core[i] && labels[i] > clusters) return "clusters are not numbered by their first cores";
    if (core[i] && labels[i] == clusters) ++clusters;
    int64_t least = -1;
    for (int64_t j = 0; j < c.n; ++j) {
      if (!near[i * c.n + j] || !core[j]) continue;
      if (core[i] && labels[j] != labels[i]) return "near cores are apart";
      if (least < 0 || labels[j] < least) least = labels[j];
    }
    if (!core[i] && labels[i] != least) return "a border row is not in the first cluster that it touches, or noise is not noise";
  }
  return pieces == clusters ? nullptr : "cores that do not hang together share a cluster";
}

template <class Executor>
std::vector<int64_t> labels_of(Executor run, const EncodedCase& c) {
  std::vector<int64_t> scratch(static_cast<size_t>(fu::LabelScratch::words(c.n, c.indptr.back(), c.min_samples)), -7);
  std::vector<int64_t> labels(c.need.size() * static_cast<size_t>(c.n), -9);
  const int64_t rows = static_cast<int64_t>(c.need.size());
  fu::pseudo_labels(run, c.encoding(), c.need.data(), rows, c.min_samples, labels.data(), scratch.data());
  return labels;
}

void test_pseudo_labels() {
  std::mt19937 rng(11);
  int noise = 0, clusters = 0, told = 0;
  for (int trial = 0; trial < 60; ++trial) {
    const EncodedCase c = random_encoding(rng);
    const std::vector<int64_t> labels = labels_of(fu::HostExecutor(4, 1), c);
    for (size_t e = 0; e < c.need.size(); ++e) {
      const int64_t* const row = labels.data() + e * static_cast<size_t>(c.n);
      const Truth truth(c, c.need[e]);
      const char* const wrong = wrong_with(c, truth, row);
      expect(wrong == nullptr, wrong ? wrong : "", trial);
      noise += *std::min_element(row, row + c.n) < 0;
      clusters += *std::max_element(row, row + c.n) > 0;
      for (int64_t i = 0; i < c.n; ++i) {  // a planted wrong label is told
        std::vector<int64_t> other(row, row + c.n);
        other[static_cast<size_t>(i)] += other[static_cast<size_t>(i)] < 0 || rng() % 2 ? 1 : -1;
        expect(wrong_with(c, truth, other.data()) != nullptr, "a wrong label is told", trial);
        ++told;
      }
    }
    // tables of all sizes, so that rows are met range by range; teams and crews as on a GPU
    expect(labels_of(StridedExecutor{2}, c) == labels, "the same with the smallest table", trial);
    expect(labels_of(StridedExecutor{4}, c) == labels, "the same with a small table", trial);
    if (trial % 10 == 0) {
      expect(labels_of(CrewExecutor{3}, c) == labels, "the same by crews with the smallest table", trial);
      expect(labels_of(CrewExecutor{6}, c) == labels, "the same by crews", trial);
    }
  }
  expect(noise > 20 && clusters > 20 && told > 1000, "the cases have something to find", 0);
}

// A row between two clusters that finds a core of the later one first: the smaller number wins, kept or walked again.
void test_border_of_two() {
  for (const int64_t others : {4, 12}) {  // other rows of each cluster; with the larger min_samples nothing is kept for long
    EncodedCase c;
    c.n = 2 * others + 3;
    c.k = 1;
    c.min_samples = others;
    c.need = {400};
    const auto add = [&c](std::vector<std::pair<int32_t, int32_t>> row) {
      for (const auto& [column, mass] : row) {
        c.column.push_back(column);
        c.mass.push_back(mass);
      }
      c.indptr.push_back(static_cast<int64_t>(c.column.size()));
      c.lists.push_back(0);
    };
    for (int64_t i = 0; i < others; ++i) add({{3, 1000}});
    add({{2, 500}, {3, 500}});
    for (int64_t i = 0; i < others; ++i) add({{1, 1000}});
    add({{0, 500}, {1, 500}});
    add({{0, 500}, {2, 500}});
    std::vector<int64_t> expected(static_cast<size_t>(c.n), 0);
    std::fill(expected.begin() + others + 1, expected.end() - 1, 1);
    expect(labels_of(fu::HostExecutor(1), c) == expected, "a border row joins the first of its clusters", 0);
    expect(labels_of(CrewExecutor{3}, c) == expected, "so it does by crews", 0);
  }
}

// All rows hold the same few columns. Sixty thousand of them would be 3.6e9 pairs: a phase that looked at those would run
// into the time limit of the test. One more row in doubt shares a column with all, and is met once for each.
void test_collapse() {
  EncodedCase c;
  c.n = 60000;
  c.k = 13;
  c.min_samples = 4;
  for (int64_t i = 0; i < c.n; ++i) {
    const bool apart = i == c.n - 1;
    for (const int64_t column : {int64_t{0}, int64_t{1}, apart ? i : int64_t{2}}) {
      c.column.push_back(static_cast<int32_t>(column));
      c.mass.push_back(column == i && apart ? 800 : column == 2 ? 800 : 100);
    }
    c.indptr.push_back(static_cast<int64_t>(c.column.size()));
    for (int64_t a = 0; a < c.k; ++a) c.lists.push_back(static_cast<int32_t>((i + a) % c.n));
  }
  c.need = {571};
  std::vector<int64_t> expected(static_cast<size_t>(c.n), 0);
  expected.back() = -1;
  expect(labels_of(fu::HostExecutor(2), c) == expected, "collapsed rows are one cluster", 0);
}

// The launches that a build without CUDA asks for, carried out here: the functor's bytes are all that a kernel gets.
struct Recorder : fu::Launcher {
  std::vector<std::string> kernels;
  int64_t flag = 0;
  void launch(const std::string& kernel, unsigned blocks, unsigned threads, int64_t n, const void* functor,
              int64_t bytes) override {
    expect(blocks >= 1 && threads == 256 && n >= 1 && functor && bytes > 0 && bytes < 4096, "a launch fits a GPU", 0);
    kernels.push_back(kernel);
  }
  int64_t read(const int64_t*) override { return flag--; }
  void write(int64_t*, int64_t) override {}
};

void test_launches() {
  std::mt19937 rng(3);
  const EncodedCase c = random_encoding(rng);
  std::vector<int64_t> labels(static_cast<size_t>(c.n));
  auto owned = std::make_unique<Recorder>();
  Recorder& recorder = *owned;
  fu::LaunchExecutor run(std::move(owned));
  int64_t word = 0;
  fu::pseudo_labels(run, c.encoding(), c.need.data(), 1, 99, labels.data(), &word);
  const auto has = [&recorder](const char* name) {
    return std::find(recorder.kernels.begin(), recorder.kernels.end(), name) != recorder.kernels.end();
  };
  expect(has("fastreid_u::each_crew_kernel<fastreid_u::SettleDoubt>"), "a kernel goes by its C++ name", 0);
  expect(has("fastreid_u::each_row_kernel<fastreid_u::MeasureNearest>"), "a kernel goes by its C++ name", 1);
  expect(has("fastreid_u::each_kernel<fastreid_u::Label>"), "a kernel goes by its C++ name", 2);
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
  test_pseudo_labels();
  test_border_of_two();
  test_collapse();
  test_launches();
  if (failures == 0) std::printf("all passed\n");
  return failures != 0;
}

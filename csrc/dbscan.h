// SPDX-License-Identifier: Apache-2.0
// Exact DBSCAN on a graph of distances, once, for host threads and for CUDA.
//
// The definition, which is also what scikit-learn's depth-first search computes (Ester et al., KDD 1996):
//   core     a point with >= min_samples near points in its row, itself among them
//   reach    core u reaches v if a chain of near entries, each in the row of a core point, leads from u to v
//   label    with m(v) = the smallest core that reaches v: the rank of m(v) among all such m; no m, no cluster: -1
// m is one number per connected component if near entries come in both directions, so a union-find over those gives it,
// in parallel and in any order. An entry stored or near in one direction only (an asymmetric graph) is found on the way,
// and a monotone pass then lowers m along such entries until nothing changes. Either way the result is unique.
//
// An executor runs the phases: `each(n, f)` calls f(i), `each_row(n, f)` calls f(i, team), in any order and concurrently,
// and a phase sees all that the phase before wrote; `read` and `write` move one word.
#pragma once

#include "graph.h"
#include "scan.h"
#include "union_find.h"

namespace fastreid_u {

struct Scratch {
  int64_t* parent;  // [n] union-find over core points
  int64_t* first;   // [n] at a root: the smallest core known to reach its component
  int64_t* number;  // [n] clusters that start before a point: at a cluster's first core, its label
  int64_t* sums;    // [kMaxRuns]
  int64_t* flag;    // [1]

  static int64_t words(int64_t n) { return 3 * n + kMaxRuns + 1; }
  Scratch(int64_t* p, int64_t n)
      : parent(p), first(p + n), number(p + 2 * n), sums(p + 3 * n), flag(p + 3 * n + kMaxRuns) {}
};

template <class View>
struct Problem {
  using Value = typename View::value_type;
  View graph;
  Value eps;
  int64_t min_samples;
  int64_t* labels;  // [n]
  uint8_t* core;    // [n]
  Scratch scratch;
};

template <class View>
struct MarkCore {
  Problem<View> p;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    const int64_t degree = p.graph.degree(i, p.eps, team);
    if (!team.leader) return;
    p.core[i] = degree >= p.min_samples;
    p.labels[i] = -1;
    p.scratch.parent[i] = i;
    p.scratch.first[i] = i;
  }
};

// Joins cores that are near in both directions; raises the flag if some pair is near in one direction only.
template <class View>
struct LinkCores {
  Problem<View> p;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    if (!p.core[i]) return;
    const Problem<View>& q = p;
    p.graph.each_near(i, p.eps, team, [&q, i](int64_t j) {
      int64_t* parent = q.scratch.parent;
      // Joined already, by whatever path: the entry can add nothing. This also spares most look-ups.
      if (!q.core[j] || find_root(parent, i) == find_root(parent, j)) return;
      if (q.graph.near(j, i, q.eps)) {
        unite(parent, i, j);
      } else {
        store_relaxed(q.scratch.flag, 1);
      }
    });
  }
};

struct Flatten {
  Scratch scratch;
  FU_HD void operator()(int64_t i) const { flatten(scratch.parent, i); }
};

// Asymmetric graphs only: lowers `first` along every near entry between components. The values fall and are bounded, so
// repeating until a pass changes nothing ends, at the one fixed point. Needs at most as many passes as components in a
// chain.
template <class View>
struct PassFirstOn {
  Problem<View> p;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    if (!p.core[i]) return;
    const Problem<View>& q = p;
    const int64_t first = load_relaxed(p.scratch.first + p.scratch.parent[i]);
    p.graph.each_near(i, p.eps, team, [&q, first](int64_t j) {
      if (!q.core[j]) return;
      if (lower_unsigned(q.scratch.first + q.scratch.parent[j], first)) store_relaxed(q.scratch.flag, 1);
    });
  }
};

struct IsStart {
  Scratch scratch;
  const uint8_t* core;
  FU_HD int64_t operator()(int64_t i) const { return core[i] && scratch.parent[i] == i && scratch.first[i] == i; }
};

// A core takes its cluster's number and offers it to the non-cores in its row, who keep the smallest; -1 is the largest
// unsigned word, so a point that is offered nothing stays noise.
template <class View>
struct SpreadLabels {
  Problem<View> p;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    if (!p.core[i]) return;
    const Problem<View>& q = p;
    const int64_t label = p.scratch.number[p.scratch.first[p.scratch.parent[i]]];
    if (team.leader) p.labels[i] = label;
    p.graph.each_near(i, p.eps, team, [&q, label](int64_t j) {
      if (!q.core[j]) lower_unsigned(q.labels + j, label);
    });
  }
};

template <class View>
struct CheckRow {
  View graph;
  int64_t* worst;  // the smallest row * kFaultKinds + fault, as unsigned words
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    int64_t* const out = worst;
    graph.check(i, team, [out, i](Fault fault) { lower_unsigned(out, i * kFaultKinds + fault); });
  }
};

template <class Executor, class View>
int64_t check_graph(Executor& run, View graph, int64_t* scratch) {
  run.write(scratch, -1);
  run.each_row(graph.n, CheckRow<View>{graph, scratch});
  return run.read(scratch);
}

template <class Executor, class View>
void dbscan(Executor& run, View graph, double eps, int64_t min_samples, int64_t* labels, uint8_t* core,
            int64_t* scratch_words) {
  const int64_t n = graph.n;
  if (n == 0) return;
  const Scratch scratch(scratch_words, n);
  const Problem<View> problem{graph, static_cast<typename View::value_type>(eps), min_samples, labels, core, scratch};

  run.each_row(n, MarkCore<View>{problem});
  run.write(scratch.flag, 0);
  run.each_row(n, LinkCores<View>{problem});
  run.each(n, Flatten{scratch});
  while (run.read(scratch.flag)) {
    run.write(scratch.flag, 0);
    run.each_row(n, PassFirstOn<View>{problem});
  }
  sum_before(run, n, IsStart{scratch, core}, scratch.number, scratch.sums);
  run.each_row(n, SpreadLabels<View>{problem});
}

// Labels and core flags [n_eps, n], one row for each eps.
template <class Executor>
void dbscan(Executor& run, const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples, int64_t* labels,
            uint8_t* core, int64_t* scratch) {
  with_view(graph, [&](auto view) {
    for (int64_t e = 0; e < n_eps; ++e) {
      dbscan(run, view, eps[e], min_samples, labels + e * graph.n, core + e * graph.n, scratch);
    }
  });
}

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// DBSCAN of an encoding without its graph: no pair is stored, so no data can make them too many. Once, for host threads
// and for CUDA, with the labels that dbscan.h would give on the graph of all near pairs.
//
// Labels need who is core, how cores hang together, and the few neighbours of the others:
//   1. Measure each row against its nearest neighbours. That finds nearly all cores and nearly all their links.
//   2. Rows still in doubt meet every row that can be near, until `min_samples` are; those that do not get there are no
//      cores and keep the rows that they found.
//   3. Join cores along the hits of step 1. Two cores of different sets meet only in columns that cores of several sets
//      list. So only such columns are walked, by the row of the smaller set (which bounds the work by the number of
//      pairs that meet: the rows of one giant set walk nothing), and only near rows of another set are joined. On real
//      data this proves that nothing was missed.
// A cluster's number is the rank of its smallest core; a border row takes the smallest number among its core neighbours.
// If all features collapse to one point, step 1 joins all rows and step 3 has no column to walk.
//
// The executor is that of dbscan.h; besides, `each_crew(n, f)` calls f(i, crew, table).
#pragma once

#include "dbscan.h"
#include "prefix_index.h"

namespace fastreid_u {

// Neighbours measured in step 1 beside the row itself. Twelve find nearly every core of the usual settings; a larger
// `min_samples` takes twice as many as it asks for, up to the bits of a word.
constexpr int64_t kNearest = 12, kMostNearest = 62;
// Neighbours that a border row keeps; rows that have more are walked once more at the end.
constexpr int64_t kKept = 6;
// A column listed by the cores of one set at most; a row that is no core.
constexpr int64_t kNone = -1;

struct LabelScratch {
  Scratch scratch;  // `number` counts the members of a set until clusters are numbered
  int64_t* set;     // [n] of a core: its set, larger sets above smaller ones; else kNone
  int64_t* shared;  // [n] of a column that cores of several sets list: the largest of them; else kNone
  int64_t* hits;    // [n] bit a: the row's neighbour a is a near row, not seen before
  int64_t* start;   // [n + 1]
  int64_t* list;    // [nnz]
  int32_t* holders;
  int32_t* limit;
  int32_t* found;  // [n] of a row that is no core: its near rows, itself not counted
  int32_t* kept;   // [n * keep] up to `keep` of them
  uint8_t* core;   // [n]

  static int64_t keep(int64_t min_samples) {
    return min_samples - 2 < 0 ? 0 : min_samples - 2 < kKept ? min_samples - 2 : kKept;
  }
  static int64_t words(int64_t n, int64_t nnz, int64_t min_samples) {
    return Scratch::words(n) + 4 * n + 1 + nnz + (n * (3 + keep(min_samples)) + 1) / 2 + (n + 7) / 8;
  }
  LabelScratch(int64_t* p, int64_t n, int64_t nnz, int64_t min_samples) : scratch(p, n) {
    set = p + Scratch::words(n);
    shared = set + n;
    hits = shared + n;
    start = hits + n;
    list = start + n + 1;
    holders = reinterpret_cast<int32_t*>(list + nnz);
    limit = holders + n;
    found = limit + n;
    kept = found + n;
    core = reinterpret_cast<uint8_t*>(list + nnz + (n * (3 + keep(min_samples)) + 1) / 2);
  }
};

struct Clustering {
  Index index;
  const int32_t* neighbours;  // [n, k]
  int64_t k;
  int64_t nearest;  // of them are measured
  int64_t weight;
  int64_t need;    // overlap of near rows
  int64_t enough;  // overlap of prefixes that near rows have at least
  int64_t min_samples;
  int64_t keep;
  LabelScratch at;
  int64_t* labels;

  template <class Team>
  FU_HD bool near(int64_t i, int64_t j, Team team) const {
    return index.rows.near(i, j, need, weight, team);
  }
};

struct MeasureNearest {
  Clustering c;
  template <class Team>
  FU_HD void operator()(int64_t i, Team team) const {
    const int32_t* const neighbour = c.neighbours + i * c.k;
    int64_t hits = 0, count = 1;
    for (int64_t a = 0; a < c.nearest; ++a) {
      const int32_t j = neighbour[a];
      if (j == i || !c.near(i, j, team)) continue;
      bool twice = false;  // a list should not repeat a row; if it does, it still is one neighbour
      for (int64_t b = 0; b < a; ++b) twice |= neighbour[b] == j;
      if (twice) continue;
      hits |= int64_t{1} << a;
      ++count;
    }
    if (!team.leader) return;
    c.at.hits[i] = hits;
    c.at.core[i] = count >= c.min_samples;
    c.at.scratch.parent[i] = i;
    c.at.scratch.number[i] = 0;
  }
};

struct Always {
  FU_HD bool operator()(int64_t) const { return true; }
};

struct SettleDoubt {
  Clustering c;
  template <class Crew>
  FU_HD void operator()(int64_t i, Crew crew, Table table) const {
    if (c.at.core[i]) return;
    crew.sync();
    if (crew.leader) *table.found = 0;
    crew.sync();
    const Clustering& q = c;
    const auto wanting = [&q, crew, table] { return crew.read(table.found) + 1 < q.min_samples; };
    const auto visit = [&q, i, crew, table, wanting](int64_t j, int64_t shared, auto team) {
      // the first member asks for all: others may see another count
      if (shared < q.enough || !team.any(team.leader && wanting()) || !q.near(i, j, team) || !team.leader) return;
      const int32_t found = crew.add(table.found, 1);
      if (found < q.keep) q.at.kept[i * q.keep + found] = static_cast<int32_t>(j);
    };
    c.index.each_met(i, crew, table, Always{}, Always{}, visit, [wanting] { return !wanting(); });
    if (!crew.leader) return;
    c.at.core[i] = !wanting();
    c.at.found[i] = crew.read(table.found);
  }
};

struct LinkNearest {
  Clustering c;
  FU_HD void operator()(int64_t i) const {
    if (!c.at.core[i]) return;
    for (int64_t a = 0; a < c.nearest; ++a) {
      if (!(c.at.hits[i] >> a & 1)) continue;
      const int64_t j = c.neighbours[i * c.k + a];
      if (c.at.core[j]) unite(c.at.scratch.parent, i, j);
    }
  }
};

struct CountMembers {
  Clustering c;
  FU_HD void operator()(int64_t i) const {
    if (!c.at.core[i]) return;
    flatten(c.at.scratch.parent, i);
    add_relaxed(c.at.scratch.number + load_relaxed(c.at.scratch.parent + i), 1);
  }
};

struct NameSets {
  Clustering c;
  FU_HD void operator()(int64_t i) const {
    const int64_t root = c.at.scratch.parent[i];
    c.at.set[i] = c.at.core[i] ? c.at.scratch.number[root] << 32 | root : kNone;
  }
};

struct CompareSets {
  Clustering c;
  template <class Team>
  FU_HD void operator()(int64_t column, Team team) const {
    int64_t largest = kNone, smallest = kNone;
    for (int64_t e = c.index.start[column] + team.rank; e < c.index.start[column + 1]; e += team.size) {
      const int64_t set = c.at.set[c.index.list[e] >> 32];
      if (set == kNone) continue;
      largest = set > largest ? set : largest;
      smallest = smallest == kNone || set < smallest ? set : smallest;
    }
    const int64_t top = team.most(largest);
    const bool several = team.any(smallest != kNone && smallest != top);
    if (team.leader) c.at.shared[column] = several ? top : kNone;
  }
};

struct Bridge {
  Clustering c;
  template <class Crew>
  FU_HD void operator()(int64_t i, Crew crew, Table table) const {
    const int64_t own = c.at.set[i];
    if (own == kNone) return;
    const Clustering& q = c;
    int64_t* const parent = c.at.scratch.parent;
    const auto use_column = [&q, own](int64_t column) { return q.at.shared[column] > own; };
    const auto use_row = [&q, own](int64_t j) { return q.at.set[j] > own; };
    const auto visit = [&q, parent, i](int64_t j, int64_t shared, auto team) {
      if (shared < q.enough) return;
      // the first member asks for all: the sets are growing together
      const bool apart = team.any(team.leader && find_root(parent, i) != find_root(parent, j));
      if (apart && q.near(i, j, team) && team.leader) unite(parent, i, j);
    };
    c.index.each_met(i, crew, table, use_column, use_row, visit, [] { return false; });
  }
};

struct StartsCluster {
  const int64_t* parent;
  const uint8_t* core;
  FU_HD int64_t operator()(int64_t i) const { return core[i] && parent[i] == i; }
};

struct Label {
  Clustering c;
  FU_HD int64_t of_core(int64_t i) const { return c.at.scratch.number[c.at.scratch.parent[i]]; }
  FU_HD void operator()(int64_t i) const {
    int64_t label = -1;
    if (c.at.core[i]) {
      label = of_core(i);
    } else if (c.at.found[i] <= c.keep) {
      for (int64_t s = 0; s < c.at.found[i]; ++s) {
        const int64_t j = c.at.kept[i * c.keep + s];
        if (c.at.core[j] && (label == -1 || of_core(j) < label)) label = of_core(j);
      }
    }
    c.labels[i] = label;
  }
};

// Border rows with more neighbours than they could keep.
struct LabelCrowded {
  Label label;
  template <class Crew>
  FU_HD void operator()(int64_t i, Crew crew, Table table) const {
    const Clustering& q = label.c;
    if (q.at.core[i] || q.at.found[i] <= q.keep) return;
    const Label& of = label;
    const auto visit = [&q, &of, i](int64_t j, int64_t shared, auto team) {
      if (shared >= q.enough && q.near(i, j, team) && team.leader) lower_unsigned(q.labels + i, of.of_core(j));
    };
    const auto is_core = [&q](int64_t j) { return q.at.core[j] != 0; };
    q.index.each_met(i, crew, table, Always{}, is_core, visit, [] { return false; });
  }
};

template <class Executor>
void cluster(Executor& run, const Clustering& c) {
  const int64_t n = c.index.rows.n;
  run.each_row(n, MeasureNearest{c});
  run.each_crew(n, SettleDoubt{c});
  run.each(n, LinkNearest{c});
  run.each(n, CountMembers{c});
  run.each(n, NameSets{c});
  run.each_row(n, CompareSets{c});
  run.each_crew(n, Bridge{c});
  run.each(n, Flatten{c.at.scratch});
  sum_before(run, n, StartsCluster{c.at.scratch.parent, c.at.core}, c.at.scratch.number, c.at.scratch.sums);
  run.each(n, Label{c});
  if (c.min_samples - 2 > c.keep) run.each_crew(n, LabelCrowded{Label{c}});
}

// labels [n_needs, n], one row for each of `need`.
template <class Executor>
void pseudo_labels(Executor& run, const Encoding& encoding, const int64_t* need, int64_t n_needs, int64_t min_samples,
                   int64_t* labels, int64_t* scratch) {
  const int64_t n = encoding.n, k = encoding.k;
  if (n == 0 || n_needs == 0) return;
  int64_t least = need[0];
  for (int64_t e = 1; e < n_needs; ++e) least = need[e] < least ? need[e] : least;
  // The work is flat between half and 0.7 of `need`. Rows may be so far apart and still near that prefixes are whole
  // rows anyway.
  const int64_t tail = least > encoding.weight / 8 ? least * 7 / 10 : 0;

  const LabelScratch at(scratch, n, encoding.nnz, min_samples);
  const Rows rows{encoding.indptr, encoding.column, encoding.mass, n};
  const Index index{rows, at.holders, at.limit, at.start, at.list};
  build_index(run, index, tail, at.scratch.sums);

  int64_t nearest = 2 * min_samples < kMostNearest ? 2 * min_samples : kMostNearest;
  nearest = (nearest > kNearest ? nearest : kNearest) + 1;
  nearest = nearest < k ? nearest : k;
  const int64_t keep = LabelScratch::keep(min_samples);
  for (int64_t e = 0; e < n_needs; ++e) {
    cluster(run, Clustering{index, encoding.neighbours, k, nearest, encoding.weight, need[e], need[e] - tail,
                            min_samples, keep, at, labels + e * n});
  }
}

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// Typed views of a distance graph, read one row at a time by a team.
#pragma once

#include "api.h"
#include "team.h"

namespace fastreid_u {

// Two points are near if their stored distance is <= eps. An entry that is not stored is farther than any eps, except on
// the diagonal, where it is 0; this is how scikit-learn reads a sparse matrix of distances.
template <class Value, class Index>
struct CsrView {
  using value_type = Value;
  const int64_t* indptr;
  const Index* indices;
  const Value* data;
  int64_t n, nnz;

  template <class Team>
  FU_HD int64_t degree(int64_t i, Value eps, Team team) const {
    int64_t near = 0;
    bool stored_self = false;
    for (int64_t k = indptr[i] + team.rank; k < indptr[i + 1]; k += team.size) {
      near += data[k] <= eps;
      stored_self |= indices[k] == i;
    }
    near = team.sum(near);
    return team.any(stored_self) ? near : near + 1;
  }

  template <class Team, class Visit>
  FU_HD void each_near(int64_t i, Value eps, Team team, Visit visit) const {
    for (int64_t k = indptr[i] + team.rank; k < indptr[i + 1]; k += team.size) {
      if (data[k] <= eps) visit(static_cast<int64_t>(indices[k]));
    }
  }

  // Is (i, j), i != j, stored and near? Binary search: this is why rows must ascend.
  FU_HD bool near(int64_t i, int64_t j, Value eps) const {
    int64_t lo = indptr[i], hi = indptr[i + 1];
    while (lo < hi) {
      const int64_t mid = lo + (hi - lo) / 2;
      if (indices[mid] < j) {
        lo = mid + 1;
      } else {
        hi = mid;
      }
    }
    return lo < indptr[i + 1] && indices[lo] == j && data[lo] <= eps;
  }

  template <class Team, class Report>
  FU_HD void check(int64_t i, Team team, Report report) const {
    const int64_t begin = indptr[i], end = indptr[i + 1];
    if (begin < 0 || end < begin || end > nnz || (i == 0 && begin != 0) || (i == n - 1 && end != nnz)) {
      report(kFaultIndptr);
      return;
    }
    for (int64_t k = begin + team.rank; k < end; k += team.size) {
      if (indices[k] < 0 || indices[k] >= n) report(kFaultColumn);
      if (k > begin && indices[k] <= indices[k - 1]) report(kFaultOrder);
      if (data[k] != data[k]) report(kFaultNan);
      if (data[k] < 0) report(kFaultNegative);
    }
  }
};

template <class Value>
struct DenseView {
  using value_type = Value;
  const Value* data;  // [n, n]
  int64_t n;

  template <class Team>
  FU_HD int64_t degree(int64_t i, Value eps, Team team) const {
    int64_t near = 0;
    for (int64_t j = team.rank; j < n; j += team.size) near += data[i * n + j] <= eps;
    return team.sum(near);
  }

  template <class Team, class Visit>
  FU_HD void each_near(int64_t i, Value eps, Team team, Visit visit) const {
    for (int64_t j = team.rank; j < n; j += team.size) {
      if (data[i * n + j] <= eps) visit(j);
    }
  }

  FU_HD bool near(int64_t i, int64_t j, Value eps) const { return data[i * n + j] <= eps; }

  template <class Team, class Report>
  FU_HD void check(int64_t i, Team team, Report report) const {
    for (int64_t j = team.rank; j < n; j += team.size) {
      const Value d = data[i * n + j];
      if (d != d) report(kFaultNan);
      if (d < 0) report(kFaultNegative);
    }
  }
};

template <class Value, class Run>
void with_value_type(const Graph& graph, Run run) {
  const auto* data = static_cast<const Value*>(graph.data);
  if (graph.indptr == nullptr) {
    run(DenseView<Value>{data, graph.n});
  } else if (graph.index_bytes == 4) {
    run(CsrView<Value, int32_t>{graph.indptr, static_cast<const int32_t*>(graph.indices), data, graph.n, graph.nnz});
  } else {
    run(CsrView<Value, int64_t>{graph.indptr, static_cast<const int64_t*>(graph.indices), data, graph.n, graph.nnz});
  }
}

// Calls run(view) with the view that fits the graph's types.
template <class Run>
void with_view(const Graph& graph, Run run) {
  if (graph.value_bytes == 4) {
    with_value_type<float>(graph, run);
  } else {
    with_value_type<double>(graph, run);
  }
}

}  // namespace fastreid_u

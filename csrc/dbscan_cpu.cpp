// SPDX-License-Identifier: Apache-2.0
#include "dbscan.h"
#include "host_executor.h"

namespace fastreid_u {

int64_t dbscan_scratch_words(int64_t n) { return Scratch::words(n); }

int64_t check_graph_cpu(const Graph& graph, int64_t* scratch, int threads) {
  HostExecutor run(threads);
  int64_t fault = -1;
  with_view(graph, [&](auto view) { fault = check_graph(run, view, scratch); });
  return fault;
}

void dbscan_cpu(const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples, int64_t* labels,
                uint8_t* core, int64_t* scratch, int threads) {
  HostExecutor run(threads);
  with_view(graph, [&](auto view) {
    for (int64_t e = 0; e < n_eps; ++e) {
      dbscan(run, view, eps[e], min_samples, labels + e * graph.n, core + e * graph.n, scratch);
    }
  });
}

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
#include "dbscan.h"
#include "host_executor.h"
#include "pseudo_labels.h"

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
  dbscan(run, graph, eps, n_eps, min_samples, labels, core, scratch);
}

int64_t pseudo_labels_scratch_words(int64_t n, int64_t nnz, int64_t min_samples) {
  return LabelScratch::words(n, nnz, min_samples);
}

void pseudo_labels_cpu(const Encoding& encoding, const int64_t* need, int64_t n_needs, int64_t min_samples,
                       int64_t* labels, int64_t* scratch, int threads) {
  HostExecutor run(threads);
  pseudo_labels(run, encoding, need, n_needs, min_samples, labels, scratch);
}

}  // namespace fastreid_u

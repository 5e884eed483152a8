// SPDX-License-Identifier: Apache-2.0
#include "launch_executor.h"
#include "pseudo_labels.h"

namespace fastreid_u {

int64_t check_graph_by(Launcher& launcher, const Graph& graph, int64_t* scratch) {
  LaunchExecutor run(launcher);
  int64_t fault = -1;
  with_view(graph, [&](auto view) { fault = check_graph(run, view, scratch); });
  return fault;
}

void dbscan_by(Launcher& launcher, const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples,
               int64_t* labels, uint8_t* core, int64_t* scratch) {
  LaunchExecutor run(launcher);
  dbscan(run, graph, eps, n_eps, min_samples, labels, core, scratch);
}

void pseudo_labels_by(Launcher& launcher, const Encoding& encoding, const int64_t* need, int64_t n_needs,
                      int64_t min_samples, int64_t* labels, int64_t* scratch) {
  LaunchExecutor run(launcher);
  pseudo_labels(run, encoding, need, n_needs, min_samples, labels, scratch);
}

}  // namespace fastreid_u

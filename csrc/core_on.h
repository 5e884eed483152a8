// SPDX-License-Identifier: Apache-2.0
// The functions of api.h by the phases of dbscan.h and pseudo_labels.h, on any executor.
#pragma once

#include <utility>

#include "dbscan.h"
#include "pseudo_labels.h"

namespace fastreid_u {

template <class Executor>
class CoreOn : public Core {
 public:
  template <class... Given>
  explicit CoreOn(Given&&... given) : run_(std::forward<Given>(given)...) {}

  int64_t check_graph(const Graph& graph, int64_t* scratch) override {
    int64_t fault = -1;
    with_view(graph, [&](auto view) { fault = fastreid_u::check_graph(run_, view, scratch); });
    return fault;
  }

  void dbscan(const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples, int64_t* labels, uint8_t* core,
              int64_t* scratch) override {
    fastreid_u::dbscan(run_, graph, eps, n_eps, min_samples, labels, core, scratch);
    run_.wait();
  }

  void pseudo_labels(const Encoding& encoding, const int64_t* need, int64_t n_needs, int64_t min_samples,
                     int64_t* labels, int64_t* scratch) override {
    fastreid_u::pseudo_labels(run_, encoding, need, n_needs, min_samples, labels, scratch);
    run_.wait();
  }

 private:
  Executor run_;
};

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// What bindings.cpp may call: raw pointers, sizes and a stream. No Python here, no framework.
#pragma once

#include <cstdint>

namespace fastreid_u {

// An N x N matrix of distances, row-major, or its stored entries as compressed sparse rows.
struct Graph {
  const int64_t* indptr = nullptr;  // [n + 1]; null means dense
  const void* indices = nullptr;    // [nnz] int32 or int64, strictly ascending within a row
  const void* data = nullptr;       // [nnz] or [n * n], float32 or float64
  int64_t n = 0;
  int64_t nnz = 0;
  int index_bytes = 8;
  int value_bytes = 4;
};

// What can be wrong with a row of a graph. bindings.cpp hands the names on.
enum Fault : int64_t { kFaultIndptr, kFaultColumn, kFaultOrder, kFaultNan, kFaultNegative, kFaultKinds };

// Words of int64 scratch that the functions below need for n points.
int64_t dbscan_scratch_words(int64_t n);

// The first faulty row as row * kFaultKinds + fault, or -1 if the graph may be clustered.
int64_t check_graph_cpu(const Graph& graph, int64_t* scratch, int threads);

// Labels [n_eps, n] and core flags [n_eps, n], one row per eps. The graph must have passed the check.
void dbscan_cpu(const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples, int64_t* labels,
                uint8_t* core, int64_t* scratch, int threads);

#ifdef FASTREID_U_WITH_CUDA
// The same on a GPU: all pointers but `eps` are device pointers; `stream` is a cudaStream_t. Both wait for the stream.
int64_t check_graph_cuda(const Graph& graph, int64_t* scratch, int device, void* stream);
void dbscan_cuda(const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples, int64_t* labels,
                 uint8_t* core, int64_t* scratch, int device, void* stream);
#endif

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// What bindings.cpp may call: raw pointers, sizes and a stream. No Python here, no framework.
#pragma once

#include "integers.h"

#ifndef __CUDACC_RTC__
#include <memory>
#include <string>
#endif

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

// N rows of integers, compressed (fastreid_u/cpu/k_reciprocal.py, kernels/k_reciprocal.py), and their neighbour lists.
struct Encoding {
  const int64_t* indptr = nullptr;      // [n + 1]
  const int32_t* column = nullptr;      // [nnz] in [0, n), strictly ascending within a row
  const int32_t* mass = nullptr;        // [nnz] positive; a row adds up to at most `weight`
  const int32_t* neighbours = nullptr;  // [n, k] in [0, n), nearest first: hints, which no label depends on
  int64_t n = 0;                        // below 2^31
  int64_t nnz = 0;
  int64_t k = 0;
  int64_t weight = 0;  // below 2^31
};

// What can be wrong with a row of a graph. bindings.cpp hands the names on.
enum Fault : int64_t { kFaultIndptr, kFaultColumn, kFaultOrder, kFaultNan, kFaultNegative, kFaultKinds };

#ifndef __CUDACC_RTC__
// Words of int64 scratch that Core needs for n points: with a graph, and with an encoding, where it takes 8 bytes an entry
// and about 60 a row.
int64_t dbscan_scratch_words(int64_t n);
int64_t pseudo_labels_scratch_words(int64_t n, int64_t nnz, int64_t min_samples);

// What bindings.cpp runs. On a GPU all pointers but `eps` and `need` are device pointers.
class Core {
 public:
  virtual ~Core() = default;
  // The first faulty row as row * kFaultKinds + fault, or -1 if the graph may be clustered.
  virtual int64_t check_graph(const Graph& graph, int64_t* scratch) = 0;
  // Labels [n_eps, n] and core flags [n_eps, n], one row per eps. The graph must have passed the check.
  virtual void dbscan(const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples, int64_t* labels,
                      uint8_t* core, int64_t* scratch) = 0;
  // Labels [n_needs, n] of DBSCAN on the graph of the pairs that overlap by `need` >= 1 or more, one row for each.
  virtual void pseudo_labels(const Encoding& encoding, const int64_t* need, int64_t n_needs, int64_t min_samples,
                             int64_t* labels, int64_t* scratch) = 0;
};

std::unique_ptr<Core> on_threads(int threads);

// Runs kernels that it has compiled from these sources, in order: a GPU without CUDA in this build.
class Launcher {
 public:
  virtual ~Launcher() = default;
  // The kernel of this C++ name, on blocks * threads threads, with the arguments n and a struct of so many bytes.
  virtual void launch(const std::string& kernel, unsigned blocks, unsigned threads, int64_t n, const void* functor,
                      int64_t bytes) = 0;
  virtual int64_t read(const int64_t* p) = 0;
  virtual void write(int64_t* p, int64_t value) = 0;
};
std::unique_ptr<Core> on_launcher(std::unique_ptr<Launcher> launcher);

#ifdef FASTREID_U_WITH_CUDA
// By nvcc's kernels; `stream` is a cudaStream_t. Each function waits for it.
std::unique_ptr<Core> on_cuda(int device, void* stream);
#endif
#endif

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// Runs the phases of dbscan.h and pseudo_labels.h on a CUDA stream, by the kernels of device.cuh.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "pseudo_labels.h"

namespace fastreid_u {
namespace {

void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("dbscan: ") + what + " failed: " + cudaGetErrorString(status));
  }
}

class DeviceExecutor {
 public:
  DeviceExecutor(int device, void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
    require(cudaGetDevice(&before_), "cudaGetDevice");
    require(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceExecutor() { cudaSetDevice(before_); }
  DeviceExecutor(const DeviceExecutor&) = delete;
  DeviceExecutor& operator=(const DeviceExecutor&) = delete;

  template <class F>
  void each(int64_t n, F f) {
    each_kernel<<<grid_of(n, kThreads), kThreads, 0, stream_>>>(n, f);
    require(cudaGetLastError(), "launch");
  }

  template <class F>
  void each_row(int64_t n, F f) {
    each_row_kernel<<<grid_of(n, kThreads / kWarp), kThreads, 0, stream_>>>(n, f);
    require(cudaGetLastError(), "launch");
  }

  template <class F>
  void each_crew(int64_t n, F f) {
    each_crew_kernel<<<grid_of(n, 1, kMostCrews), kThreads, 0, stream_>>>(n, f);
    require(cudaGetLastError(), "launch");
  }

  int64_t read(const int64_t* p) {
    int64_t value = 0;
    require(cudaMemcpyAsync(&value, p, sizeof value, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
    synchronize();
    return value;
  }

  void write(int64_t* p, int64_t value) {
    require(cudaMemcpyAsync(p, &value, sizeof value, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
  }

  void synchronize() { require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_;
  int before_ = 0;
};

}  // namespace

int64_t check_graph_cuda(const Graph& graph, int64_t* scratch, int device, void* stream) {
  DeviceExecutor run(device, stream);
  int64_t fault = -1;
  with_view(graph, [&](auto view) { fault = check_graph(run, view, scratch); });
  return fault;
}

void dbscan_cuda(const Graph& graph, const double* eps, int64_t n_eps, int64_t min_samples, int64_t* labels,
                 uint8_t* core, int64_t* scratch, int device, void* stream) {
  DeviceExecutor run(device, stream);
  dbscan(run, graph, eps, n_eps, min_samples, labels, core, scratch);
  run.synchronize();
}

void pseudo_labels_cuda(const Encoding& encoding, const int64_t* need, int64_t n_needs, int64_t min_samples,
                        int64_t* labels, int64_t* scratch, int device, void* stream) {
  DeviceExecutor run(device, stream);
  pseudo_labels(run, encoding, need, n_needs, min_samples, labels, scratch);
  run.synchronize();
}

}  // namespace fastreid_u

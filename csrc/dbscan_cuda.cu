// SPDX-License-Identifier: Apache-2.0
// Runs the phases of dbscan.h on a CUDA stream: one warp per row, one thread per point.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dbscan.h"

namespace fastreid_u {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 1 << 20;  // the loops stride over whatever lies beyond

void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("dbscan: ") + what + " failed: " + cudaGetErrorString(status));
  }
}

struct WarpTeam {
  static constexpr int64_t size = kWarp;
  int64_t rank;
  bool leader;
  __device__ explicit WarpTeam(unsigned lane) : rank(lane), leader(lane == 0) {}
  __device__ int64_t sum(int64_t x) const {
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  __device__ bool any(bool x) const { return __any_sync(0xffffffffu, x); }
};

template <class F>
__global__ void each_kernel(int64_t n, F f) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) f(i);
}

// All lanes of a warp hold the same row, so they enter and leave the loop together, as the team's `sum` needs.
template <class F>
__global__ void each_row_kernel(int64_t n, F f) {
  constexpr int kRows = kThreads / kWarp;
  const WarpTeam team(threadIdx.x % kWarp);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp; i < n; i += stride) f(i, team);
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
    each_kernel<<<blocks(n, kThreads), kThreads, 0, stream_>>>(n, f);
    require(cudaGetLastError(), "launch");
  }

  template <class F>
  void each_row(int64_t n, F f) {
    each_row_kernel<<<blocks(n, kThreads / kWarp), kThreads, 0, stream_>>>(n, f);
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
  static unsigned blocks(int64_t n, int64_t per_block) {
    return static_cast<unsigned>(std::clamp<int64_t>((n + per_block - 1) / per_block, 1, kMaxBlocks));
  }

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
  with_view(graph, [&](auto view) {
    for (int64_t e = 0; e < n_eps; ++e) {
      dbscan(run, view, eps[e], min_samples, labels + e * graph.n, core + e * graph.n, scratch);
    }
  });
  run.synchronize();
}

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// Runs the phases of dbscan.h and pseudo_labels.h on a CUDA stream, by the kernels of device.cuh.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core_on.h"
#include "device.cuh"

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
    wait();
    return value;
  }

  void write(int64_t* p, int64_t value) {
    require(cudaMemcpyAsync(p, &value, sizeof value, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
  }

  void wait() { require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_;
  int before_ = 0;
};

}  // namespace

std::unique_ptr<Core> on_cuda(int device, void* stream) {
  return std::make_unique<CoreOn<DeviceExecutor>>(device, stream);
}

}  // namespace fastreid_u

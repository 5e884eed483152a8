// SPDX-License-Identifier: Apache-2.0
// The kernels that run a functor of dbscan.h or pseudo_labels.h: one thread a point, one warp a row, or one block a row
// with a table in shared memory. Compiled by nvcc into _C (on_cuda.cu), or by NVRTC at run time.
#pragma once

#include "device_shape.h"
#include "table.h"

namespace fastreid_u {

constexpr int kLog2Table = 12;  // with the list of used slots 40 KB of shared memory

struct WarpTeam {
  static constexpr int64_t size = kWarp;
  int64_t rank;
  bool leader;
  __device__ explicit WarpTeam(unsigned lane) : rank(lane), leader(lane == 0) {}
  __device__ int64_t sum(int64_t x) const {
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  __device__ int64_t most(int64_t x) const {
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const int64_t other = __shfl_xor_sync(0xffffffffu, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
  __device__ bool any(bool x) const { return __any_sync(0xffffffffu, x); }
};

struct BlockCrew {
  static constexpr int64_t size = kThreads, count = kThreads / kWarp;
  int64_t rank, number;
  bool leader;
  WarpTeam team;
  __device__ explicit BlockCrew(unsigned thread)
      : rank(thread), number(thread / kWarp), leader(thread == 0), team(thread % kWarp) {}
  __device__ void sync() const { __syncthreads(); }
  __device__ int32_t read(const int32_t* p) const { return *static_cast<const volatile int32_t*>(p); }
  __device__ int32_t claim(int32_t* p, int32_t expected, int32_t desired) const {
    return atomicCAS(p, expected, desired);
  }
  __device__ int32_t add(int32_t* p, int32_t x) const { return atomicAdd(p, x); }
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

template <class F>
__global__ void __launch_bounds__(kThreads) each_crew_kernel(int64_t n, F f) {
  __shared__ Slot slots[1 << kLog2Table];
  __shared__ int32_t used[1 << (kLog2Table - 1)];
  __shared__ int32_t met, found;
  for (int s = threadIdx.x; s < 1 << kLog2Table; s += kThreads) slots[s] = Slot{kFree, 0};
  if (threadIdx.x == 0) met = 0;
  __syncthreads();
  const BlockCrew crew(threadIdx.x);
  const Table table{slots, used, &met, &found, kLog2Table};
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) f(i, crew, table);
}

}  // namespace fastreid_u

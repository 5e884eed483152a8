// SPDX-License-Identifier: Apache-2.0
// The relaxed atomics of the DBSCAN core, spelled once for host threads and for CUDA threads.
//
// Relaxed order is enough everywhere: inside a phase each word is read and written on its own, and phases are separated
// by a thread join or a kernel boundary, which order everything.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef __CUDACC__
#define FU_HD __host__ __device__ __forceinline__
#else
#define FU_HD inline
#endif

namespace fastreid_u {

FU_HD int64_t load_relaxed(const int64_t* p) {
#ifdef __CUDA_ARCH__
  return *static_cast<const volatile int64_t*>(p);
#else
  return std::atomic_ref<int64_t>(*const_cast<int64_t*>(p)).load(std::memory_order_relaxed);
#endif
}

FU_HD void store_relaxed(int64_t* p, int64_t value) {
#ifdef __CUDA_ARCH__
  *static_cast<volatile int64_t*>(p) = value;
#else
  std::atomic_ref<int64_t>(*p).store(value, std::memory_order_relaxed);
#endif
}

// Replaces *p by `desired` if it still is `expected`; says whether it did.
FU_HD bool compare_and_swap(int64_t* p, int64_t expected, int64_t desired) {
#ifdef __CUDA_ARCH__
  using word = unsigned long long;
  return atomicCAS(reinterpret_cast<word*>(p), static_cast<word>(expected), static_cast<word>(desired)) ==
         static_cast<word>(expected);
#else
#ifdef FU_LET_OTHERS_IN  // a test lets other threads in here, so that races are lost on any machine
  FU_LET_OTHERS_IN();
#endif
  return std::atomic_ref<int64_t>(*p).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
#endif
}

// Lowers *p to `value` in the order of unsigned words, in which -1 is the largest; says whether that changed it.
FU_HD bool lower_unsigned(int64_t* p, int64_t value) {
#ifdef __CUDA_ARCH__
  using word = unsigned long long;
  return atomicMin(reinterpret_cast<word*>(p), static_cast<word>(value)) > static_cast<word>(value);
#else
  std::atomic_ref<int64_t> word(*p);
  int64_t seen = word.load(std::memory_order_relaxed);
  while (static_cast<uint64_t>(value) < static_cast<uint64_t>(seen)) {
    if (word.compare_exchange_weak(seen, value, std::memory_order_relaxed)) return true;
  }
  return false;
#endif
}

}  // namespace fastreid_u

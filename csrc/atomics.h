// SPDX-License-Identifier: Apache-2.0
// The relaxed atomics of the DBSCAN core, spelled once for host threads and for CUDA threads.
//
// Relaxed order is enough everywhere: inside a phase each word is read and written on its own, and phases are separated
// by a thread join or a kernel boundary, which order everything. On the host these are builtins of GCC and Clang:
// std::atomic_ref needs C++20, which older CMake cannot ask of nvcc.
#pragma once

#include "integers.h"

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
  return __atomic_load_n(p, __ATOMIC_RELAXED);
#endif
}

FU_HD void store_relaxed(int64_t* p, int64_t value) {
#ifdef __CUDA_ARCH__
  *static_cast<volatile int64_t*>(p) = value;
#else
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
#endif
}

// Adds x to *p; returns what was there.
FU_HD int32_t add_relaxed(int32_t* p, int32_t x) {
#ifdef __CUDA_ARCH__
  return atomicAdd(p, x);
#else
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
#endif
}

FU_HD int64_t add_relaxed(int64_t* p, int64_t x) {
#ifdef __CUDA_ARCH__
  using word = unsigned long long;
  return static_cast<int64_t>(atomicAdd(reinterpret_cast<word*>(p), static_cast<word>(x)));
#else
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
#endif
}

// Replaces *p by `desired` if it still is `expected`; true if it did.
FU_HD bool compare_and_swap(int64_t* p, int64_t expected, int64_t desired) {
#ifdef __CUDA_ARCH__
  using word = unsigned long long;
  return atomicCAS(reinterpret_cast<word*>(p), static_cast<word>(expected), static_cast<word>(desired)) ==
         static_cast<word>(expected);
#else
#ifdef FU_LET_OTHERS_IN  // a test lets other threads in here, so that races are lost on any machine
  FU_LET_OTHERS_IN();
#endif
  return __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
#endif
}

// Lowers *p to `value` in the order of unsigned words, in which -1 is the largest; true if that changed it.
FU_HD bool lower_unsigned(int64_t* p, int64_t value) {
#ifdef __CUDA_ARCH__
  using word = unsigned long long;
  return atomicMin(reinterpret_cast<word*>(p), static_cast<word>(value)) > static_cast<word>(value);
#else
  int64_t seen = load_relaxed(p);
  while (static_cast<uint64_t>(value) < static_cast<uint64_t>(seen)) {
    if (compare_and_swap(p, seen, value)) return true;
    seen = load_relaxed(p);
  }
  return false;
#endif
}

}  // namespace fastreid_u

// SPDX-License-Identifier: Apache-2.0
// Runs the phases of dbscan.h and pseudo_labels.h on a GPU through a Launcher, in a build that knows no CUDA: the order of
// phases and the contents of functors come from here, the kernels are device.cuh, compiled at run time.
//
// A kernel is named by its C++ expression, which the compiler spells. Functors hold pointers, integers and floats, laid
// out alike by host compilers and CUDA's.
#pragma once

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "api.h"
#include "device_shape.h"

// "... [with F = fastreid_u::Flatten]" of GCC, "... [F = fastreid_u::Flatten]" of Clang. Inside the namespace GCC would
// leave that out.
template <class F>
const char* fastreid_u_spelled() {
  return __PRETTY_FUNCTION__;
}

namespace fastreid_u {

class LaunchExecutor {
 public:
  explicit LaunchExecutor(std::unique_ptr<Launcher> launcher) : launcher_(std::move(launcher)) {}

  template <class F>
  void each(int64_t n, F f) {
    launch("each_kernel", grid_of(n, kThreads), n, f);
  }

  template <class F>
  void each_row(int64_t n, F f) {
    launch("each_row_kernel", grid_of(n, kThreads / kWarp), n, f);
  }

  template <class F>
  void each_crew(int64_t n, F f) {
    launch("each_crew_kernel", grid_of(n, 1, kMostCrews), n, f);
  }

  int64_t read(const int64_t* p) { return launcher_->read(p); }
  void write(int64_t* p, int64_t value) { launcher_->write(p, value); }
  void wait() const {}  // the caller's stream puts the results before whatever reads them

 private:
  template <class F>
  void launch(const char* kernel, unsigned blocks, int64_t n, const F& f) {
    static_assert(std::is_trivially_copyable_v<F>);
    const std::string pretty = fastreid_u_spelled<F>();
    const size_t begin = pretty.find("F = ") + 4;
    const std::string functor = pretty.substr(begin, pretty.rfind(']') - begin);
    launcher_->launch("fastreid_u::" + std::string(kernel) + "<" + functor + ">", blocks, kThreads, n, &f, sizeof f);
  }

  std::unique_ptr<Launcher> launcher_;
};

}  // namespace fastreid_u

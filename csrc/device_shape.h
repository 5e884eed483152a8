// SPDX-License-Identifier: Apache-2.0
// How many blocks and threads the kernels of device.cuh are launched with.
#pragma once

#include "integers.h"

namespace fastreid_u {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Each block of crews sets up a table: enough of them to fill any GPU several times over, and no more.
constexpr int64_t kMostCrews = 1 << 13;

// Blocks that do n points, `per_block` at a time; the kernels' loops stride over whatever lies beyond.
inline unsigned grid_of(int64_t n, int64_t per_block, int64_t most = 1 << 20) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

}  // namespace fastreid_u

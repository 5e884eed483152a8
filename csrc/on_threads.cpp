// SPDX-License-Identifier: Apache-2.0
#include "core_on.h"
#include "host_executor.h"

namespace fastreid_u {

int64_t dbscan_scratch_words(int64_t n) { return Scratch::words(n); }

int64_t pseudo_labels_scratch_words(int64_t n, int64_t nnz, int64_t min_samples) {
  return LabelScratch::words(n, nnz, min_samples);
}

std::unique_ptr<Core> on_threads(int threads) { return std::make_unique<CoreOn<HostExecutor>>(threads); }

}  // namespace fastreid_u

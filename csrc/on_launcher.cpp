// SPDX-License-Identifier: Apache-2.0
#include "core_on.h"
#include "launch_executor.h"

namespace fastreid_u {

std::unique_ptr<Core> on_launcher(std::unique_ptr<Launcher> launcher) {
  return std::make_unique<CoreOn<LaunchExecutor>>(std::move(launcher));
}

}  // namespace fastreid_u

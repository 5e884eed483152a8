// SPDX-License-Identifier: Apache-2.0
// Integers of known width for every compiler that reads these files; NVRTC, which compiles at run time, brings no
// standard headers. Fits 64-bit Linux, where NVRTC is used.
#pragma once

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
#else
#include <cstdint>
#endif

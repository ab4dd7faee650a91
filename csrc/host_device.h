// One function for the C++ compiler and for the CUDA ones.
#pragma once

#ifdef __CUDACC_RTC__  // CUDA's run-time compiler has no standard headers
namespace std {
using int32_t = int;
using int64_t = long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
}  // namespace std
#else
#include <cstdint>
#endif

#ifdef __CUDACC__
#define ENGINE_HOST_DEVICE __host__ __device__
#else
#define ENGINE_HOST_DEVICE
#endif

// Half types as they are stored, and a kernel for every type that is.
#pragma once

#include "host_device.h"

#ifndef __CUDA_ARCH__
#include <cstring>
#endif

namespace engine {

ENGINE_HOST_DEVICE inline float float_of_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

ENGINE_HOST_DEVICE inline std::uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// Bits that ascend as values do; the greatest for NaN, the same for both zeros.
ENGINE_HOST_DEVICE inline std::uint32_t ascending_bits(float value) {
  constexpr std::uint32_t kSign = 0x80000000u;
  if (value != value) return 0xffffffffu;
  const std::uint32_t bits = bits_of_float(value == 0 ? 0.0f : value);
  return bits & kSign ? ~bits : bits | kSign;
}

ENGINE_HOST_DEVICE inline float float_of_ascending_bits(std::uint32_t bits) {
  constexpr std::uint32_t kSign = 0x80000000u;
  return float_of_bits(bits & kSign ? bits ^ kSign : ~bits);
}

// Exact, and free of branches: loops over them become vector instructions.
struct Float16 {
  std::uint16_t bits;

  ENGINE_HOST_DEVICE explicit operator float() const {
    // The exponents of float32 go 112 further; the product moves them, those of subnormal numbers too.
    const float magnitude = float_of_bits(static_cast<std::uint32_t>(bits & 0x7fffu) << 13) * 0x1p112f;
    const std::uint32_t infinite = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return float_of_bits(bits_of_float(magnitude) | infinite | static_cast<std::uint32_t>(bits & 0x8000u) << 16);
  }
};

struct BFloat16 {
  std::uint16_t bits;

  ENGINE_HOST_DEVICE explicit operator float() const { return float_of_bits(static_cast<std::uint32_t>(bits) << 16); }
};

}  // namespace engine

// KERNEL(name of the type, type) for each type that the kernels read.
#define ENGINE_EVERY_STORAGE(KERNEL) \
  KERNEL(float32, float)             \
  KERNEL(float16, engine::Float16)   \
  KERNEL(bfloat16, engine::BFloat16)

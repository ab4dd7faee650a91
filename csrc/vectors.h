// Short vectors of one width, by the vector extension of GCC and Clang: one text for every instruction set. A function
// that uses them is inlined into one compiled for the instructions meant (see isa.h).
#pragma once

#include <cstdint>
#include <cstring>

// Reports of the vector calling convention do not concern functions that are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define ENGINE_INLINE inline __attribute__((always_inline))

namespace engine {

template <typename Real, int kBytes>
struct VectorOf {
  static constexpr int kLanes = kBytes / sizeof(Real);
  typedef Real Type __attribute__((vector_size(kBytes)));
};

template <typename Vector, typename Real>
ENGINE_INLINE Vector load(const Real* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(Vector));
  return vector;
}

// The first `count` lanes from `source`, the others `otherwise`.
template <typename Vector, typename Real>
ENGINE_INLINE Vector load_part(const Real* source, std::int64_t count, Real otherwise) {
  Vector vector = otherwise - Vector{};
  std::memcpy(&vector, source, static_cast<std::size_t>(count) * sizeof(Real));
  return vector;
}

template <typename Vector, typename Real>
ENGINE_INLINE void store(Real* target, Vector vector) {
  std::memcpy(target, &vector, sizeof(Vector));
}

template <typename Vector>
ENGINE_INLINE Vector maximum(Vector first, Vector second) {
  return first > second ? first : second;
}

template <typename Real, int kBytes>
struct Halves {
  typename VectorOf<Real, kBytes / 2>::Type lower, upper;
};

template <typename Real, int kBytes>
ENGINE_INLINE Halves<Real, kBytes> halves(typename VectorOf<Real, kBytes>::Type vector) {
  Halves<Real, kBytes> result;
  std::memcpy(&result, &vector, sizeof(vector));
  return result;
}

template <typename Real, int kBytes>
ENGINE_INLINE Real largest_lane(typename VectorOf<Real, kBytes>::Type vector) {
  if constexpr (kBytes > 16) {
    const auto parts = halves<Real, kBytes>(vector);
    return largest_lane<Real, kBytes / 2>(maximum(parts.lower, parts.upper));
  } else {
    Real largest = vector[0];
    for (int lane = 1; lane < VectorOf<Real, kBytes>::kLanes; ++lane) {
      largest = vector[lane] > largest ? vector[lane] : largest;
    }
    return largest;
  }
}

template <typename Real, int kBytes>
ENGINE_INLINE Real sum_of_lanes(typename VectorOf<Real, kBytes>::Type vector) {
  if constexpr (kBytes > 16) {
    const auto parts = halves<Real, kBytes>(vector);
    return sum_of_lanes<Real, kBytes / 2>(parts.lower + parts.upper);
  } else {
    Real sum = vector[0];
    for (int lane = 1; lane < VectorOf<Real, kBytes>::kLanes; ++lane) sum += vector[lane];
    return sum;
  }
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where a Taylor polynomial of this degree is off by
// less than .1 units in the last place. ln 2 comes in two parts, of which n times the first is exact.
template <typename Real>
struct ExpParts;

template <>
struct ExpParts<float> {
  using Bits = std::uint32_t;
  static constexpr int kDegree = 7;
  static constexpr int kMantissaBits = 23;
  static constexpr float kLeast = -87.0f;  // exp of it is still a normal number
  static constexpr float kLn2High = 0x1.62e4p-1f;
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRounder = 0x1.8p23f;  // adding it leaves the nearest integer in the lowest bits
};

template <>
struct ExpParts<double> {
  using Bits = std::uint64_t;
  static constexpr int kDegree = 13;
  static constexpr int kMantissaBits = 52;
  static constexpr double kLeast = -708.0;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1;
  static constexpr double kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kRounder = 0x1.8p52;
};

// exp of lanes at most 88 (double: 709), to 2 units in the last place; 0 where the result is below the normal numbers.
template <typename Real, int kBytes>
ENGINE_INLINE typename VectorOf<Real, kBytes>::Type exponential(typename VectorOf<Real, kBytes>::Type x) {
  using Parts = ExpParts<Real>;
  using Vector = typename VectorOf<Real, kBytes>::Type;
  using Bits = typename VectorOf<typename Parts::Bits, kBytes>::Type;
  constexpr Real kLog2E = Real(1.4426950408889634);

  const Vector shifted = x * kLog2E + Parts::kRounder;
  const Vector n = shifted - Parts::kRounder;
  const Vector r = (x - n * Parts::kLn2High) - n * Parts::kLn2Low;

  double inverse_factorial = 1;
  for (int k = 2; k <= Parts::kDegree; ++k) inverse_factorial /= k;
  Vector polynomial = Real(inverse_factorial) - Vector{};
  for (int k = Parts::kDegree; k > 0; --k) {
    inverse_factorial *= k;
    polynomial = polynomial * r + Real(inverse_factorial);
  }
  const Bits exponent = reinterpret_cast<Bits>(shifted) << Parts::kMantissaBits;
  const Bits bits = reinterpret_cast<Bits>(polynomial) + exponent;
  return x >= Parts::kLeast ? reinterpret_cast<Vector>(bits) : Vector{};
}

}  // namespace engine

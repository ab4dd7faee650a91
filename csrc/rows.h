// StoredRows of features as they are stored, read in the type that is computed in.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace engine {

// As numbered by engine/ops/_native.py.
enum class Storage { float32, float64, float16, bfloat16 };

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Exact, and free of branches: loops over them become vector instructions.
struct Float16 {
  std::uint16_t bits;

  explicit operator float() const {
    // The exponents of float32 go 112 further; the product moves them, those of subnormal numbers too.
    const float magnitude = float_of_bits(static_cast<std::uint32_t>(bits & 0x7fffu) << 13) * 0x1p112f;
    std::uint32_t wide;
    std::memcpy(&wide, &magnitude, sizeof(wide));
    const std::uint32_t infinite = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return float_of_bits(wide | infinite | static_cast<std::uint32_t>(bits & 0x8000u) << 16);
  }
};

struct BFloat16 {
  std::uint16_t bits;

  explicit operator float() const { return float_of_bits(static_cast<std::uint32_t>(bits) << 16); }
};

// A contiguous matrix of any float type. A block of rows is read in place where it is stored as `Real`, else converted
// into memory of the caller's: the whole matrix never is.
template <typename Real>
class StoredRows {
 public:
  StoredRows(const void* data, Storage storage, std::int64_t width) : data_(data), storage_(storage), width_(width) {}

  std::int64_t width() const { return width_; }

  // `count` rows from `first` on, [count, width]. Valid until `buffer` is used again.
  const Real* block(std::int64_t first, std::int64_t count, std::vector<Real>& buffer) const {
    switch (storage_) {
      case Storage::float32:
        return block_of<float>(first, count, buffer);
      case Storage::float64:
        return block_of<double>(first, count, buffer);
      case Storage::float16:
        return block_of<Float16>(first, count, buffer);
      default:
        return block_of<BFloat16>(first, count, buffer);
    }
  }

 private:
  template <typename Stored>
  const Real* block_of(std::int64_t first, std::int64_t count, std::vector<Real>& buffer) const {
    const Stored* source = static_cast<const Stored*>(data_) + first * width_;
    if constexpr (std::is_same_v<Stored, Real>) {
      return source;
    } else {
      const std::size_t entries = static_cast<std::size_t>(count * width_);
      if (buffer.size() < entries) buffer.resize(entries);
      Real* target = buffer.data();
      for (std::size_t entry = 0; entry < entries; ++entry) {
        if constexpr (std::is_floating_point_v<Stored>) {
          target[entry] = static_cast<Real>(source[entry]);
        } else {
          target[entry] = static_cast<Real>(static_cast<float>(source[entry]));
        }
      }
      return target;
    }
  }

  const void* data_;
  Storage storage_;
  std::int64_t width_;
};

}  // namespace engine

// Rows of features as they are stored, read in the type that is computed in.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "storage.h"

namespace engine {

// As numbered by engine/ops/_native.py.
enum class Storage { float32, float64, float16, bfloat16 };

// Columns [column, column + depth) of some rows: entry (i, k) is entries[i * stride + k] * scale(i).
template <typename Real>
struct RowsPart {
  const Real* entries;
  std::int64_t stride;
  const Real* scales;

  Real scale(std::int64_t i) const { return scales ? scales[i] : Real(1); }
};

// A contiguous matrix of any float type, each row times its scale where `scales` is not null. A block of rows is read
// in place where it is stored as `Real` and unscaled, else converted into memory of the caller's: the whole matrix
// never is.
template <typename Real>
class StoredRows {
 public:
  StoredRows(const void* data, Storage storage, std::int64_t width, const Real* scales = nullptr)
      : data_(data), storage_(storage), width_(width), scales_(scales) {}

  std::int64_t width() const { return width_; }

  bool operator==(const StoredRows& other) const {
    return data_ == other.data_ && storage_ == other.storage_ && width_ == other.width_ && scales_ == other.scales_;
  }

  // The same rows, times one scale each.
  StoredRows scaled(const Real* scales) const { return {data_, storage_, width_, scales}; }

  // The rows from `first` on.
  StoredRows from(std::int64_t first) const {
    const auto* data = static_cast<const unsigned char*>(data_) + first * width_ * entry_size();
    return {data, storage_, width_, scales_ ? scales_ + first : nullptr};
  }

  // `count` rows from `first` on, [count, width]. Valid until `buffer` is used again.
  const Real* block(std::int64_t first, std::int64_t count, std::vector<Real>& buffer) const {
    if (storage_ == kPlain && scales_ == nullptr) return static_cast<const Real*>(data_) + first * width_;
    reserve(buffer, count * width_);
    if (scales_ == nullptr) {
      convert(first, 0, count * width_, Real(1), buffer.data());  // there is no gap between rows
    } else {
      for (std::int64_t row = 0; row < count; ++row) read(first + row, 0, width_, buffer.data() + row * width_);
    }
    return buffer.data();
  }

  // `depth` columns of them, from `column` on. Valid until `buffer` is used again.
  RowsPart<Real> part(std::int64_t first, std::int64_t count, std::int64_t column, std::int64_t depth,
                      std::vector<Real>& buffer) const {
    const Real* scales = scales_ ? scales_ + first : nullptr;
    if (storage_ == kPlain) return {static_cast<const Real*>(data_) + first * width_ + column, width_, scales};
    reserve(buffer, count * depth);
    for (std::int64_t row = 0; row < count; ++row) {
      convert(first + row, column, depth, Real(1), buffer.data() + row * depth);
    }
    return {buffer.data(), depth, scales};
  }

  // Copies columns [column, column + depth) of one row.
  void read(std::int64_t row, std::int64_t column, std::int64_t depth, Real* target) const {
    convert(row, column, depth, scales_ ? scales_[row] : Real(1), target);
  }

 private:
  static constexpr Storage kPlain = std::is_same_v<Real, float> ? Storage::float32 : Storage::float64;

  std::int64_t entry_size() const { return storage_ == Storage::float64 ? 8 : storage_ == Storage::float32 ? 4 : 2; }

  static void reserve(std::vector<Real>& buffer, std::int64_t entries) {
    if (buffer.size() < static_cast<std::size_t>(entries)) buffer.resize(static_cast<std::size_t>(entries));
  }

  // target[k] = scale * the entry k places after `column` of `row`, for k < count.
  void convert(std::int64_t row, std::int64_t column, std::int64_t count, Real scale, Real* target) const {
    const std::int64_t first = row * width_ + column;
    switch (storage_) {
      case Storage::float32:
        return convert_from(static_cast<const float*>(data_) + first, count, scale, target);
      case Storage::float64:
        return convert_from(static_cast<const double*>(data_) + first, count, scale, target);
      case Storage::float16:
        return convert_from(static_cast<const Float16*>(data_) + first, count, scale, target);
      default:
        return convert_from(static_cast<const BFloat16*>(data_) + first, count, scale, target);
    }
  }

  template <typename Stored>
  static void convert_from(const Stored* source, std::int64_t count, Real scale, Real* target) {
    for (std::int64_t k = 0; k < count; ++k) {
      if constexpr (std::is_floating_point_v<Stored>) {
        target[k] = static_cast<Real>(source[k]) * scale;
      } else {
        target[k] = static_cast<Real>(static_cast<float>(source[k])) * scale;
      }
    }
  }

  const void* data_;
  Storage storage_;
  std::int64_t width_;
  const Real* scales_;
};

}  // namespace engine

#include "matmul.h"

#include <algorithm>

namespace engine {
namespace {

constexpr std::int64_t kRows = BlockSize::kRows;
constexpr std::int64_t kColumns = BlockSize::kColumns;
constexpr std::int64_t kDepth = BlockSize::kDepth;

constexpr std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// NAME<Real, PANEL_ROWS>: PANEL_ROWS x 2 vectors of BYTES bytes stay in registers over the whole depth. A macro, as GCC
// splits vectors into those of the enclosing function's target before it inlines: a shared inline body would be
// compiled for the narrowest.
#define ENGINE_DEFINE_TILE(NAME, TARGET, BYTES)                                                 \
  template <typename Real, int kPanelRows>                                                      \
  TARGET void NAME(const Real* left, const Real* right, std::int64_t depth, Real* block) {      \
    typedef Real Vector __attribute__((vector_size(BYTES), aligned(alignof(Real)), may_alias)); \
    constexpr std::int64_t kLanes = BYTES / sizeof(Real);                                       \
    Vector sums[kPanelRows][2] = {};                                                            \
    for (std::int64_t k = 0; k < depth; ++k, left += kPanelRows, right += 2 * kLanes) {         \
      const Vector low = *reinterpret_cast<const Vector*>(right);                               \
      const Vector high = *reinterpret_cast<const Vector*>(right + kLanes);                     \
      _Pragma("GCC unroll 16") for (int row = 0; row < kPanelRows; ++row) {                     \
        sums[row][0] += left[row] * low;                                                        \
        sums[row][1] += left[row] * high;                                                       \
      }                                                                                         \
    }                                                                                           \
    _Pragma("GCC unroll 16") for (int row = 0; row < kPanelRows; ++row) {                       \
      *reinterpret_cast<Vector*>(block + row * kColumns) += sums[row][0];                       \
      *reinterpret_cast<Vector*>(block + row * kColumns + kLanes) += sums[row][1];              \
    }                                                                                           \
  }

// As many rows as leave registers for two vectors of the right panel and one broadcast entry of the left.
ENGINE_DEFINE_TILE(tile_portable, , 16)
constexpr int kPortableRows = 4;
#ifdef ENGINE_X86
ENGINE_DEFINE_TILE(tile_avx2, ENGINE_AVX2, 32)
ENGINE_DEFINE_TILE(tile_avx512, ENGINE_AVX512, 64)
constexpr int kAvx2Rows = 6;
constexpr int kAvx512Rows = 12;
static_assert(kRows % kAvx2Rows == 0 && kRows % kAvx512Rows == 0 && kColumns % 32 == 0);
#endif
static_assert(kRows % kPortableRows == 0 && kColumns % kRows == 0);

// Rows that one packed panel holds at most: two of the widest vectors.
constexpr std::int64_t kMostPanelRows = 2 * 64 / sizeof(float);

// The entries of the vectors a and b, numbered through, that the list names; GCC before 12 lacks Clang's builtin.
#ifdef __clang__
#define ENGINE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ENGINE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// packed[k * panel + row] = rows[row * width + k] * scales[row] for 4 x 4 entries, through registers.
template <typename Real>
void transpose_4x4(const Real* rows, std::int64_t width, const Real* scales, std::int64_t panel, Real* packed) {
  typedef Real Vector __attribute__((vector_size(4 * sizeof(Real)), aligned(alignof(Real)), may_alias));
  const auto source = [=](std::int64_t row) {
    return *reinterpret_cast<const Vector*>(rows + row * width) * scales[row];
  };
  const Vector a = source(0), b = source(1), c = source(2), d = source(3);
  const Vector ab_low = ENGINE_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = ENGINE_SHUFFLE(a, b, 2, 6, 3, 7);
  const Vector cd_low = ENGINE_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = ENGINE_SHUFFLE(c, d, 2, 6, 3, 7);
  const auto target = [=](std::int64_t k) { return reinterpret_cast<Vector*>(packed + k * panel); };
  *target(0) = ENGINE_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  *target(1) = ENGINE_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  *target(2) = ENGINE_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  *target(3) = ENGINE_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

// Panels of `panel` rows, each [depth, panel], with zeros in place of the rows that the last one lacks.
template <typename Real>
void pack(const RowsPart<Real>& part, std::int64_t count, std::int64_t depth, std::int64_t panel, Real* packed) {
  const std::int64_t width = part.stride;
  for (std::int64_t start = 0; start < count; start += panel, packed += panel * depth) {
    const Real* rows = part.entries + start * width;
    const std::int64_t present = std::min(panel, count - start);
    if (present < panel) std::fill_n(packed, panel * depth, Real(0));
    Real scales[kMostPanelRows];
    for (std::int64_t row = 0; row < present; ++row) scales[row] = part.scale(start + row);
    const std::int64_t whole_rows = present / 4 * 4, whole_depth = depth / 4 * 4;
    for (std::int64_t k = 0; k < whole_depth; k += 4) {
      for (std::int64_t row = 0; row < whole_rows; row += 4) {
        transpose_4x4(rows + row * width + k, width, scales + row, panel, packed + k * panel + row);
      }
    }
    for (std::int64_t row = 0; row < present; ++row) {
      for (std::int64_t k = row < whole_rows ? whole_depth : 0; k < depth; ++k) {
        packed[k * panel + row] = rows[row * width + k] * scales[row];
      }
    }
  }
}

}  // namespace

template <typename Real>
typename BlockProduct<Real>::Kernel BlockProduct<Real>::choose(Isa isa) {
#ifdef ENGINE_X86
  if (isa == Isa::avx512) return {kAvx512Rows, 2 * 64 / sizeof(Real), tile_avx512<Real, kAvx512Rows>};
  if (isa == Isa::avx2) return {kAvx2Rows, 2 * 32 / sizeof(Real), tile_avx2<Real, kAvx2Rows>};
#endif
  return {kPortableRows, 2 * 16 / sizeof(Real), tile_portable<Real, kPortableRows>};
}

template <typename Real>
std::vector<typename BlockProduct<Real>::CacheLine> BlockProduct<Real>::allocate(std::int64_t entries) {
  return std::vector<CacheLine>(static_cast<std::size_t>(entries) * sizeof(Real) / sizeof(CacheLine) + 1);
}

template <typename Real>
BlockProduct<Real>::BlockProduct(Isa isa, std::int64_t width)
    : kernel_(choose(isa)),
      width_(width),
      right_(allocate(kColumns * width)),
      left_(allocate(kRows * std::min(kDepth, width))),
      block_(allocate(kRows * kColumns)) {}

template <typename Real>
void BlockProduct<Real>::set_right(const StoredRows<Real>& rows, std::int64_t first, std::int64_t count) {
  right_count_ = round_up(count, kernel_.panel_columns);
  for (std::int64_t k = 0; k < width_; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, width_ - k);
    Real* packed = right_.data()->entries + k * right_count_;
    pack(rows.part(first, count, k, depth, converted_), count, depth, kernel_.panel_columns, packed);
  }
}

template <typename Real>
const Real* BlockProduct<Real>::multiply(const StoredRows<Real>& rows, std::int64_t first, std::int64_t count,
                                         std::int64_t first_column) {
  const std::int64_t panel_rows = kernel_.panel_rows, panel_columns = kernel_.panel_columns;
  Real* block = block_.data()->entries;
  Real* left = left_.data()->entries;
  std::fill_n(block, round_up(count, panel_rows) * kColumns, Real(0));
  for (std::int64_t k = 0; k < width_; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, width_ - k);
    const Real* right = right_.data()->entries + k * right_count_;
    pack(rows.part(first, count, k, depth, converted_), count, depth, panel_rows, left);
    for (std::int64_t j = first_column / panel_columns * panel_columns; j < right_count_; j += panel_columns) {
      for (std::int64_t i = 0; i < count; i += panel_rows) {
        kernel_.tile(left + i * depth, right + j * depth, depth, block + i * kColumns + j);
      }
    }
  }
  return block;
}

template class BlockProduct<float>;
template class BlockProduct<double>;

}  // namespace engine

#include "contrast.h"

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace engine {
namespace {

constexpr std::int64_t kStripe = kContrastStripe;
constexpr std::int64_t kWidestBlock = 64;
constexpr std::int64_t kMostPanelRows = 8;

// Vectors of a row of a tile: of scores so many that blocks are a multiple of them, of targets as registers allow.
constexpr int kScoreVectors = 2;
constexpr int kSpreadVectors = 3;

// Features whose part of a score is summed in registers before it joins the others: a bound on the rounding error.
constexpr std::int64_t kDepth = 256;

// NAME<Real, PANEL_ROWS, VECTORS>: PANEL_ROWS x VECTORS vectors of BYTES bytes stay in registers over the whole depth;
// a macro for the reason given in matmul.cpp.
#define ENGINE_DEFINE_TILE(NAME, TARGET, BYTES)                                                                       \
  template <typename Real, int kPanelRows, int kVectors>                                                              \
  TARGET void NAME(const Real* left, std::int64_t row_step, std::int64_t depth_step, const Real* right,               \
                   std::int64_t right_step, std::int64_t depth, Real* const* targets) {                               \
    typedef Real Vector __attribute__((vector_size(BYTES), aligned(alignof(Real)), may_alias));                       \
    constexpr std::int64_t kLanes = BYTES / sizeof(Real);                                                             \
    Vector sums[kPanelRows][kVectors] = {};                                                                           \
    for (std::int64_t k = 0; k < depth; ++k, left += depth_step, right += right_step) {                               \
      const Vector* vectors = reinterpret_cast<const Vector*>(right);                                                 \
      _Pragma("GCC unroll 16") for (int row = 0; row < kPanelRows; ++row) {                                           \
        _Pragma("GCC unroll 4") for (int v = 0; v < kVectors; ++v) sums[row][v] += left[row * row_step] * vectors[v]; \
      }                                                                                                               \
    }                                                                                                                 \
    _Pragma("GCC unroll 16") for (int row = 0; row < kPanelRows; ++row) {                                             \
      _Pragma("GCC unroll 4") for (int v = 0; v < kVectors; ++v) {                                                    \
        *reinterpret_cast<Vector*>(targets[row] + v * kLanes) += sums[row][v];                                        \
      }                                                                                                               \
    }                                                                                                                 \
  }

template <typename Real, int kBytes>
ENGINE_INLINE void exponentiate_with(Real* scores, std::int64_t stripe, std::int64_t lanes, bool replace, Real* largest,
                                     Real* rescale, Real* sums, Real* poison) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  for (std::int64_t lane = 0; lane < lanes; lane += VectorOf<Real, kBytes>::kLanes) {
    const Vector before = load<Vector>(largest + lane);
    Vector most = before, nothing = load<Vector>(poison + lane);
    for (std::int64_t j = 0; j < stripe; ++j) {
      const Vector score = load<Vector>(scores + j * lanes + lane);
      most = maximum<Vector>(score, most);
      nothing += score * Real(0);  // comparisons lose a NaN, and an infinite score has no softmax
    }
    Vector sum = {};
    for (std::int64_t j = 0; j < stripe; ++j) {
      Real* score = scores + j * lanes + lane;
      const Vector term = exponential<Real, kBytes>(load<Vector>(score) - most);
      if (replace) store<Vector>(score, term);
      sum += term;
    }
    store<Vector>(largest + lane, most);
    store<Vector>(rescale + lane, exponential<Real, kBytes>(before - most));
    store<Vector>(sums + lane, sum);
    store<Vector>(poison + lane, nothing);
  }
}

ENGINE_DEFINE_TILE(tile_portable, , 16)
constexpr int kPortableRows = 4;

template <typename Real>
void exponentiate_portable(Real* scores, std::int64_t stripe, std::int64_t lanes, bool replace, Real* largest,
                           Real* rescale, Real* sums, Real* poison) {
  exponentiate_with<Real, 16>(scores, stripe, lanes, replace, largest, rescale, sums, poison);
}

#ifdef ENGINE_X86
ENGINE_DEFINE_TILE(tile_avx2, ENGINE_AVX2, 32)
ENGINE_DEFINE_TILE(tile_avx512, ENGINE_AVX512, 64)
constexpr int kAvx2Rows = 4;
constexpr int kAvx512Rows = 8;
static_assert(kAvx2Rows <= kMostPanelRows && kAvx512Rows <= kMostPanelRows);

template <typename Real>
ENGINE_AVX2 void exponentiate_avx2(Real* scores, std::int64_t stripe, std::int64_t lanes, bool replace, Real* largest,
                                   Real* rescale, Real* sums, Real* poison) {
  exponentiate_with<Real, 32>(scores, stripe, lanes, replace, largest, rescale, sums, poison);
}

template <typename Real>
ENGINE_AVX512 void exponentiate_avx512(Real* scores, std::int64_t stripe, std::int64_t lanes, bool replace,
                                       Real* largest, Real* rescale, Real* sums, Real* poison) {
  exponentiate_with<Real, 64>(scores, stripe, lanes, replace, largest, rescale, sums, poison);
}
#endif

}  // namespace

template <typename Real>
typename ContrastBlock<Real>::Kernel ContrastBlock<Real>::choose(Isa isa) {
#ifdef ENGINE_X86
  if (isa == Isa::avx512) {
    constexpr int kRows = kAvx512Rows;
    return {kRows, 64 / sizeof(Real), tile_avx512<Real, kRows, kScoreVectors>, tile_avx512<Real, kRows, kSpreadVectors>,
            exponentiate_avx512<Real>};
  }
  if (isa == Isa::avx2) {
    constexpr int kRows = kAvx2Rows;
    return {kRows, 32 / sizeof(Real), tile_avx2<Real, kRows, kScoreVectors>, tile_avx2<Real, kRows, kSpreadVectors>,
            exponentiate_avx2<Real>};
  }
#endif
  constexpr int kRows = kPortableRows;
  return {kRows, 16 / sizeof(Real), tile_portable<Real, kRows, kScoreVectors>,
          tile_portable<Real, kRows, kSpreadVectors>, exponentiate_portable<Real>};
}

template <typename Real>
std::int64_t ContrastBlock<Real>::choose_lanes(std::int64_t row_count, int threads) {
  return (row_count - 1) / kWidestBlock + 1 < threads ? kWidestBlock / 2 : kWidestBlock;
}

template <typename Real>
ContrastBlock<Real>::ContrastBlock(Isa isa, std::int64_t width, std::int64_t lanes)
    : kernel_(choose(isa)),
      width_(width),
      lanes_(lanes),
      features_(width * lanes),
      last_rows_(kernel_.panel_rows * width),
      panel_(kStripe * kSpreadVectors * kernel_.vector),
      edge_(kernel_.panel_rows * kSpreadVectors * kernel_.vector),
      largest_(lanes),
      rescale_(lanes),
      stripe_sum_(lanes),
      poison_(lanes),
      sum_(lanes) {}

template <typename Real>
void ContrastBlock<Real>::set_features(const Real* const* rows, std::int64_t count, double temperature) {
  count_ = count;
  std::fill(features_.begin(), features_.end(), Real(0));
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t k = 0; k < width_; ++k) features_[k * lanes_ + i] = rows[i][k] / static_cast<Real>(temperature);
  }
  std::fill(largest_.begin(), largest_.end(), -std::numeric_limits<Real>::infinity());
  std::fill(poison_.begin(), poison_.end(), Real(0));
  std::fill(sum_.begin(), sum_.end(), 0.0);
}

template <typename Real>
void ContrastBlock<Real>::score(const Real* bank_rows, std::int64_t stripe, Real* scores) {
  const std::int64_t panel_rows = kernel_.panel_rows, panel_columns = kScoreVectors * kernel_.vector;
  const std::int64_t whole = stripe / panel_rows * panel_rows;
  if (whole < stripe) std::copy_n(bank_rows + whole * width_, (stripe - whole) * width_, last_rows_.begin());
  Real* targets[kMostPanelRows];
  // Rows outermost: they come from memory, one after the other, while the features stay in the second-level cache.
  for (std::int64_t j = 0; j < stripe; j += panel_rows) {
    const Real* rows = j < whole ? bank_rows + j * width_ : last_rows_.data();
    std::fill_n(scores + j * lanes_, panel_rows * lanes_, Real(0));
    for (std::int64_t k = 0; k < width_; k += kDepth) {
      const std::int64_t depth = std::min(kDepth, width_ - k);
      for (std::int64_t i = 0; i < count_; i += panel_columns) {
        for (std::int64_t row = 0; row < panel_rows; ++row) targets[row] = scores + (j + row) * lanes_ + i;
        kernel_.score(rows + k, width_, 1, features_.data() + k * lanes_ + i, lanes_, depth, targets);
      }
    }
  }
}

template <typename Real>
void ContrastBlock<Real>::exponentiate(Real* scores, std::int64_t stripe) {
  kernel_.exponentiate(scores, stripe, lanes_, true, largest_.data(), rescale_.data(), stripe_sum_.data(),
                       poison_.data());
}

template <typename Real>
void ContrastBlock<Real>::accumulate(Real* scores, std::int64_t stripe, bool replace) {
  kernel_.exponentiate(scores, stripe, lanes_, replace, largest_.data(), rescale_.data(), stripe_sum_.data(),
                       poison_.data());
  for (std::int64_t i = 0; i < count_; ++i) sum_[i] = sum_[i] * rescale_[i] + stripe_sum_[i] + poison_[i];
}

template <typename Real>
void ContrastBlock<Real>::spread(const Real* weights, const Real* bank_rows, std::int64_t stripe,
                                 Real* const* targets) {
  const std::int64_t panel_rows = kernel_.panel_rows, panel_columns = kSpreadVectors * kernel_.vector;
  Real* entries[kMostPanelRows];
  for (std::int64_t k = 0; k < width_; k += panel_columns) {
    const std::int64_t columns = std::min(panel_columns, width_ - k);
    if (columns < panel_columns) std::fill(panel_.begin(), panel_.end(), Real(0));
    for (std::int64_t j = 0; j < stripe; ++j) {
      std::copy_n(bank_rows + j * width_ + k, columns, panel_.data() + j * panel_columns);
    }
    for (std::int64_t i = 0; i < count_; i += panel_rows) {
      const std::int64_t rows = std::min(panel_rows, count_ - i);
      const bool whole = rows == panel_rows && columns == panel_columns;
      for (std::int64_t row = 0; row < panel_rows; ++row) {
        entries[row] = whole ? targets[i + row] + k : edge_.data() + row * panel_columns;
      }
      if (!whole) std::fill(edge_.begin(), edge_.end(), Real(0));
      kernel_.spread(weights + i, 1, lanes_, panel_.data(), panel_columns, stripe, entries);
      if (whole) continue;
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t column = 0; column < columns; ++column) targets[i + row][k + column] += entries[row][column];
      }
    }
  }
}

template class ContrastBlock<float>;
template class ContrastBlock<double>;

}  // namespace engine

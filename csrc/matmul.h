// Products of row blocks, for kernels that use similarities while they are in cache and never store them all.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "rows.h"

namespace engine {

// The product of up to kRows rows with up to kColumns rows of another matrix, [rows, kColumns] in memory, stays in the
// second-level cache of one core beside the operands of kDepth features. All three are multiples of what every
// instruction set takes at a time, and kColumns of kRows.
struct BlockSize {
  static constexpr std::int64_t kRows = 96;
  static constexpr std::int64_t kColumns = 480;
  static constexpr std::int64_t kDepth = 256;
};

// One thread's products left * right^T: set_right once, then multiply with many left blocks.
//
// An entry is a sum over the features in one order (sums of kDepth features one after the other, then the sum of
// those), whichever block it is computed in: equal pairs of rows give equal bits, and so do (i, j) and (j, i).
template <typename Real>
class BlockProduct {
 public:
  BlockProduct(Isa isa, std::int64_t width);

  // Copies `count` <= kColumns rows from `first` on.
  void set_right(const StoredRows<Real>& rows, std::int64_t first, std::int64_t count);

  // The products of `count` <= kRows rows from `first` on with those of set_right: entry (i, j) at i * kColumns + j,
  // for j >= first_column; what lies before is undefined. Valid until the next call.
  const Real* multiply(const StoredRows<Real>& rows, std::int64_t first, std::int64_t count,
                       std::int64_t first_column = 0);

 private:
  // Adds the product of two packed panels to panel_rows x panel_columns entries of a block.
  using Tile = void (*)(const Real* left, const Real* right, std::int64_t depth, Real* block);
  struct Kernel {
    std::int64_t panel_rows;
    std::int64_t panel_columns;
    Tile tile;
  };
  struct alignas(64) CacheLine {
    Real entries[64 / sizeof(Real)];
  };
  static Kernel choose(Isa isa);
  static std::vector<CacheLine> allocate(std::int64_t entries);

  Kernel kernel_;
  std::int64_t width_;
  std::int64_t right_count_ = 0;
  std::vector<CacheLine> right_;
  std::vector<CacheLine> left_;
  std::vector<CacheLine> block_;
  std::vector<Real> converted_;
};

}  // namespace engine

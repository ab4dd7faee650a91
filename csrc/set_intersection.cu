// Row-wise intersection of index sets on the GPU. Semantics: engine/ops/set_intersection.py.
#include "warp_sets.h"

// a [rows, a_width] and b [rows, b_width] in, common [rows, min(a_width, b_width)] out, all contiguous. A warp per row.
extern "C" __global__ void __launch_bounds__(engine::kWarpThreads)
    set_intersection_kernel(const std::int64_t* a, const std::int64_t* b, std::int64_t a_width, std::int64_t b_width,
                            std::int64_t* scratch, std::int64_t* common) {
  const std::int64_t row = blockIdx.x, width = a_width < b_width ? a_width : b_width;
  std::int64_t* const one = engine::room_of_row(scratch, a_width + b_width);
  std::int64_t* const other = one + a_width;
  engine::copy_row(a + row * a_width, a_width, one);
  engine::copy_row(b + row * b_width, b_width, other);
  engine::sort_padded(one, a_width);
  engine::sort_padded(other, b_width);
  engine::write_set(
      one, a_width, [=](std::int64_t entry) { return engine::contains(other, b_width, entry); }, common + row * width,
      width);
}

// Row-wise union of index sets on the GPU. Semantics: engine/ops/set_union.py.
#include "warp_sets.h"

// a [rows, a_width] and b [rows, b_width] in, joined [rows, a_width + b_width] out, all contiguous. A warp per row.
extern "C" __global__ void __launch_bounds__(engine::kWarpThreads)
    set_union_kernel(const std::int64_t* a, const std::int64_t* b, std::int64_t a_width, std::int64_t b_width,
                     std::int64_t* scratch, std::int64_t* joined) {
  const std::int64_t row = blockIdx.x, width = a_width + b_width;
  std::int64_t* const entries = engine::room_of_row(scratch, width);
  engine::copy_row(a + row * a_width, a_width, entries);
  engine::copy_row(b + row * b_width, b_width, entries + a_width);
  engine::sort_padded(entries, width);
  engine::write_set(entries, width, [](std::int64_t) { return true; }, joined + row * width, width);
}

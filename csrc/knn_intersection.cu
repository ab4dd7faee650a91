// The neighbours that several views of a sample share, on the GPU. Semantics: engine/ops/knn_intersection.py.
#include "warp_sets.h"

// neighbors [views, rows, k] in, views >= 1; common [rows, k] out; both contiguous. A warp per row.
extern "C" __global__ void __launch_bounds__(engine::kWarpThreads)
    knn_intersection_kernel(const std::int64_t* neighbors, std::int64_t views, std::int64_t k, std::int64_t* scratch,
                            std::int64_t* common) {
  const std::int64_t row = blockIdx.x, rows = gridDim.x;
  std::int64_t* const entries = engine::room_of_row(scratch, views * k);
  for (std::int64_t view = 0; view < views; ++view) {
    engine::copy_row(neighbors + (view * rows + row) * k, k, entries + view * k);
    engine::sort_padded(entries + view * k, k);
  }
  const auto shared_by_all = [=](std::int64_t entry) {
    for (std::int64_t view = 1; view < views; ++view) {
      if (!engine::contains(entries + view * k, k, entry)) return false;
    }
    return true;
  };
  engine::write_set(entries, k, shared_by_all, common + row * k, k);
}

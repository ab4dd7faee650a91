// Cross-modality feature propagation on the GPU, after the search for neighbours. Semantics: engine/ops/cmfp.py.
#include "block.h"
#include "host_device.h"

// The sums of each row's neighbours with their weights: rows [count, width], `lists` lists of k neighbours and weights
// for every row, [lists, count, k]; sums [count, width]. What has no weight is not read and may be no row.
//
// A block per row (x) and kBlockThreads columns (y), a thread per column. Blocks of the same columns follow each other,
// so that these columns of all rows, which each block gathers from, stay in the second-level cache.
extern "C" __global__ void __launch_bounds__(engine::kBlockThreads)
    cmfp_collect_kernel(const float* rows, const std::int64_t* neighbors, const float* weights, std::int64_t lists,
                        std::int64_t k, std::int64_t width, float* sums) {
  const std::int64_t count = gridDim.x, row = blockIdx.x;
  const std::int64_t column = blockIdx.y * static_cast<std::int64_t>(engine::kBlockThreads) + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (std::int64_t list = 0; list < lists; ++list) {
    const std::int64_t begin = (list * count + row) * k;
#pragma unroll 8
    for (std::int64_t place = begin; place < begin + k; ++place) {
      const float weight = weights[place];
      if (weight > 0) sum += weight * rows[neighbors[place] * width + column];
    }
  }
  sums[row * width + column] = sum;
}

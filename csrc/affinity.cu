// The graph of the nearest rows on the GPU, after the search for them. Semantics: engine/ops/affinity.py.
#include "block.h"
#include "host_device.h"

// values and indices [count, k], each row's nearest in any order; row i of the CSR matrix has room for those with a
// value above 0 from starts[i] on. A warp has a row: it writes them, columns ascending, with their shares in the sum.
extern "C" __global__ void __launch_bounds__(engine::kBlockThreads)
    affinity_write_kernel(const float* values, const std::int64_t* indices, std::int64_t count, std::int64_t k,
                          const std::int64_t* starts, std::int64_t* columns, float* weights) {
  const int lane = threadIdx.x % engine::kWarpThreads, warp = threadIdx.x / engine::kWarpThreads;
  const std::int64_t row = blockIdx.x * static_cast<std::int64_t>(engine::kBlockWarps) + warp;
  if (row >= count) return;
  values += row * k;
  indices += row * k;
  float sum = 0;
  for (std::int64_t i = lane; i < k; i += engine::kWarpThreads) sum += values[i] > 0 ? values[i] : 0.0f;
  sum = engine::warp_sum(sum);
  for (std::int64_t i = lane; i < k; i += engine::kWarpThreads) {
    if (!(values[i] > 0)) continue;
    std::int64_t place = starts[row];
    for (std::int64_t other = 0; other < k; ++other) place += values[other] > 0 && indices[other] < indices[i];
    columns[place] = indices[i];
    weights[place] = values[i] / sum;
  }
}

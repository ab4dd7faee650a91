// Means of the rows that share a label, on the GPU. Semantics: engine/ops/segment_mean.py.
#include "block.h"
#include "host_device.h"
#include "storage.h"

namespace engine {

// features [rows, width]; the rows of segment s are order[starts[s]] to order[starts[s + 1] - 1], added in this order;
// means [segments, width]. A block per segment (x) and kBlockThreads columns (y), a thread per column.
template <typename Stored>
__device__ void segment_mean(const Stored* features, const std::int64_t* order, const std::int64_t* starts,
                             std::int64_t width, float* means) {
  const std::int64_t segment = blockIdx.x, begin = starts[segment], end = starts[segment + 1];
  const std::int64_t column = blockIdx.y * static_cast<std::int64_t>(kBlockThreads) + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
#pragma unroll 8
  for (std::int64_t place = begin; place < end; ++place) {
    sum += static_cast<float>(features[order[place] * width + column]);
  }
  means[segment * width + column] = sum / (end > begin ? static_cast<float>(end - begin) : 1.0f);
}

}  // namespace engine

#define SEGMENT_MEAN_KERNEL(name, Stored)                                                                         \
  extern "C" __global__ void __launch_bounds__(engine::kBlockThreads)                                             \
      segment_mean_##name##_kernel(const Stored* features, const std::int64_t* order, const std::int64_t* starts, \
                                   std::int64_t width, float* means) {                                            \
    engine::segment_mean(features, order, starts, width, means);                                                  \
  }

ENGINE_EVERY_STORAGE(SEGMENT_MEAN_KERNEL)

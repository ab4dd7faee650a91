// The neighbours that several views of a sample share, on the CPU. Semantics: engine/ops/knn_intersection.py.
#pragma once

#include <cstdint>

namespace engine {

// neighbors [views, rows, k] in, views >= 1; common [rows, k] out; both contiguous.
void knn_intersection(const std::int64_t* neighbors, std::int64_t views, std::int64_t rows, std::int64_t k,
                      std::int64_t* common, int threads);

}  // namespace engine

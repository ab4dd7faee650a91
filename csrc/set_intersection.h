// Row-wise intersection of index sets on the CPU. Semantics: engine/ops/set_intersection.py.
#pragma once

#include <cstdint>

namespace engine {

// a [rows, a_width] and b [rows, b_width] in, common [rows, min(a_width, b_width)] out, all contiguous.
void set_intersection(const std::int64_t* a, const std::int64_t* b, std::int64_t rows, std::int64_t a_width,
                      std::int64_t b_width, std::int64_t* common, int threads);

}  // namespace engine

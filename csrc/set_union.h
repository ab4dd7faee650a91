// Row-wise union of index sets on the CPU. Semantics: engine/ops/set_union.py.
#pragma once

#include <cstdint>

namespace engine {

// a [rows, a_width] and b [rows, b_width] in, joined [rows, a_width + b_width] out, all contiguous.
void set_union(const std::int64_t* a, const std::int64_t* b, std::int64_t rows, std::int64_t a_width,
               std::int64_t b_width, std::int64_t* joined, int threads);

}  // namespace engine

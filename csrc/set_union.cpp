#include "set_union.h"

#include <algorithm>

#include "parallel.h"
#include "sets.h"

namespace engine {

void set_union(const std::int64_t* a, const std::int64_t* b, std::int64_t rows, std::int64_t a_width,
               std::int64_t b_width, std::int64_t* joined, int threads) {
  const std::int64_t width = a_width + b_width;
  parallel_for(rows, set_rows_per_block(width), threads, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::int64_t* const target = joined + row * width;
      std::copy_n(a + row * a_width, a_width, target);
      std::copy_n(b + row * b_width, b_width, target + a_width);
      pad(target, make_set(target, width, target), width);
    }
  });
}

}  // namespace engine

#include "set_intersection.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "sets.h"

namespace engine {

void set_intersection(const std::int64_t* a, const std::int64_t* b, std::int64_t rows, std::int64_t a_width,
                      std::int64_t b_width, std::int64_t* common, int threads) {
  const std::int64_t width = std::min(a_width, b_width);
  parallel_for(rows, set_rows_per_block(a_width + b_width), threads, [=](std::int64_t begin, std::int64_t end) {
    std::vector<std::int64_t> one(a_width), other(b_width);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t one_size = make_set(a + row * a_width, a_width, one.data());
      const std::int64_t other_size = make_set(b + row * b_width, b_width, other.data());
      std::int64_t* const target = common + row * width;
      pad(target, intersect(one.data(), one_size, other.data(), other_size, target), width);
    }
  });
}

}  // namespace engine

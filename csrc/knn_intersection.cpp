#include "knn_intersection.h"

#include <vector>

#include "parallel.h"
#include "sets.h"

namespace engine {

void knn_intersection(const std::int64_t* neighbors, std::int64_t views, std::int64_t rows, std::int64_t k,
                      std::int64_t* common, int threads) {
  parallel_for(rows, set_rows_per_block(views * k), threads, [=](std::int64_t begin, std::int64_t end) {
    std::vector<std::int64_t> other(k);
    for (std::int64_t row = begin; row < end; ++row) {
      std::int64_t* const shared = common + row * k;
      std::int64_t size = make_set(neighbors + row * k, k, shared);
      for (std::int64_t view = 1; view < views; ++view) {
        const std::int64_t other_size = make_set(neighbors + (view * rows + row) * k, k, other.data());
        size = intersect(shared, size, other.data(), other_size, shared);
      }
      pad(shared, size, k);
    }
  });
}

}  // namespace engine

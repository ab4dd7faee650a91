#include "segment_mean.h"

#include <algorithm>
#include <vector>

namespace engine {

template <typename Real>
void segment_mean(const StoredRows<Real>& features, const std::int64_t* labels, std::int64_t row_count,
                  std::int64_t segments, Real* means) {
  const std::int64_t width = features.width();
  std::vector<std::int64_t> sizes(segments);
  std::vector<Real> buffer;
  std::fill_n(means, segments * width, Real(0));
  for (std::int64_t i = 0; i < row_count; ++i) {
    const std::int64_t label = labels[i];
    if (label < 0 || label >= segments) continue;
    ++sizes[label];
    const Real* const row = features.block(i, 1, buffer);
    Real* const sum = means + label * width;
    for (std::int64_t column = 0; column < width; ++column) sum[column] += row[column];
  }
  for (std::int64_t segment = 0; segment < segments; ++segment) {
    const Real size = static_cast<Real>(std::max<std::int64_t>(sizes[segment], 1));
    Real* const mean = means + segment * width;
    for (std::int64_t column = 0; column < width; ++column) mean[column] /= size;
  }
}

template void segment_mean(const StoredRows<float>&, const std::int64_t*, std::int64_t, std::int64_t, float*);
template void segment_mean(const StoredRows<double>&, const std::int64_t*, std::int64_t, std::int64_t, double*);

}  // namespace engine

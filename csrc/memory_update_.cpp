#include "memory_update_.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace engine {
namespace {

// As many partial sums as fill the widest vector registers: the compiler may not reorder one floating-point sum.
constexpr std::int64_t kLanes = 16;

// Starting a thread costs about as much as updating this many entries.
constexpr std::int64_t kEntriesPerThread = 1 << 20;

// row = momentum * row + (1 - momentum) * feature; returns the sum of squares of the new row.
template <typename Real>
Real blend(Real* row, const Real* feature, Real momentum, std::int64_t width) {
  const Real weight = Real(1) - momentum;
  Real lanes[kLanes] = {};
  std::int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const Real value = momentum * row[column + lane] + weight * feature[column + lane];
      row[column + lane] = value;
      lanes[lane] += value * value;
    }
  }
  for (std::int64_t lane = 0; column < width; ++column, ++lane) {
    const Real value = momentum * row[column] + weight * feature[column];
    row[column] = value;
    lanes[lane] += value * value;
  }
  Real sum = 0;
  for (const Real lane : lanes) sum += lane;
  return sum;
}

template <typename Real>
void scale(Real* row, Real factor, std::int64_t width) {
  for (std::int64_t column = 0; column < width; ++column) row[column] *= factor;
}

}  // namespace

template <typename Real>
void memory_update(Real* bank, const Real* features, const std::int64_t* labels, const Real* momentum,
                   std::int64_t bank_rows, std::int64_t batch, std::int64_t width, bool normalize, int threads) {
  const std::int64_t worthwhile = 1 + batch * width / kEntriesPerThread;
  const std::int64_t workers = std::clamp<std::int64_t>(threads, 1, worthwhile);

  // Each worker walks the whole batch in order and updates the labels that are its own: no two share a bank row, and
  // the updates of one row come in batch order, whatever the number of workers.
  parallel_for(workers, 1, threads, [=](std::int64_t worker, std::int64_t) {
    for (std::int64_t i = 0; i < batch; ++i) {
      const std::int64_t label = labels[i];
      if (label < 0 || label >= bank_rows || label % workers != worker) continue;
      Real* row = bank + label * width;
      const Real norm = std::sqrt(blend(row, features + i * width, momentum[i], width));
      if (normalize && norm > Real(0)) scale(row, Real(1) / norm, width);
    }
  });
}

template void memory_update(float*, const float*, const std::int64_t*, const float*, std::int64_t, std::int64_t,
                            std::int64_t, bool, int);
template void memory_update(double*, const double*, const std::int64_t*, const double*, std::int64_t, std::int64_t,
                            std::int64_t, bool, int);

}  // namespace engine

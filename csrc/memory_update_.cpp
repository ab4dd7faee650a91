#include "memory_update_.h"

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "parallel.h"
#include "vectors.h"

namespace engine {
namespace {

// Starting a thread costs about as much as updating this many entries.
constexpr std::int64_t kEntriesPerThread = 1 << 20;

// Sums of squares kept apart, as one would wait for its last addition.
constexpr int kSums = 4;

constexpr int kCacheLine = 64;

// row = momentum * row + (1 - momentum) * feature, over its norm when `normalize`. A row of usual width stays in the
// first cache from the blend to the division; meanwhile `next`, the row after it, comes from further away.
template <typename Real, int kBytes>
ENGINE_INLINE void update_with(Real* row, const Real* feature, const Real* next, double momentum, std::int64_t width,
                               bool normalize) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  constexpr int kLanes = VectorOf<Real, kBytes>::kLanes;
  const Real kept = static_cast<Real>(momentum), added = static_cast<Real>(1 - momentum);
  Vector squares[kSums] = {};
  std::int64_t column = 0;
  for (; column + kSums * kLanes <= width; column += kSums * kLanes) {
    for (int part = 0; part < kSums; ++part) {
      const std::int64_t here = column + part * kLanes;
      const Vector value = load<Vector>(row + here) * kept + load<Vector>(feature + here) * added;
      store(row + here, value);
      squares[part] += value * value;
    }
  }
  Real sum = sum_of_lanes<Real, kBytes>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; column < width; ++column) {
    row[column] = row[column] * kept + feature[column] * added;
    sum += row[column] * row[column];
  }
  const Real norm = std::sqrt(sum);
  if (!normalize || !(norm > 0)) return;

  const Real factor = 1 / norm;
  constexpr std::int64_t kStep = kCacheLine / sizeof(Real);
  for (column = 0; column + kStep <= width; column += kStep) {
    for (std::int64_t here = column; here < column + kStep; here += kLanes) {
      store<Vector>(row + here, load<Vector>(row + here) * factor);
    }
    __builtin_prefetch(next + column, 1);
  }
  for (; column < width; ++column) row[column] *= factor;
}

template <typename Real>
void update_portable(Real* row, const Real* feature, const Real* next, double momentum, std::int64_t width,
                     bool normalize) {
  update_with<Real, 16>(row, feature, next, momentum, width, normalize);
}

#ifdef ENGINE_X86
template <typename Real>
ENGINE_AVX2 void update_avx2(Real* row, const Real* feature, const Real* next, double momentum, std::int64_t width,
                             bool normalize) {
  update_with<Real, 32>(row, feature, next, momentum, width, normalize);
}

template <typename Real>
ENGINE_AVX512 void update_avx512(Real* row, const Real* feature, const Real* next, double momentum, std::int64_t width,
                                 bool normalize) {
  update_with<Real, 64>(row, feature, next, momentum, width, normalize);
}
#endif

template <typename Real>
using Update = void (*)(Real*, const Real*, const Real*, double, std::int64_t, bool);

template <typename Real>
Update<Real> pick_update() {
#ifdef ENGINE_X86
  switch (isa()) {
    case Isa::avx512:
      return update_avx512<Real>;
    case Isa::avx2:
      return update_avx2<Real>;
    case Isa::portable:
      break;
  }
#endif
  return update_portable<Real>;
}

}  // namespace

template <typename Real>
void memory_update(Real* bank, const Real* features, const std::int64_t* labels, const Real* momentum,
                   double shared_momentum, std::int64_t bank_rows, std::int64_t batch, std::int64_t width,
                   bool normalize, int threads) {
  const Update<Real> update = pick_update<Real>();
  const std::int64_t worthwhile = 1 + batch * width / kEntriesPerThread;
  const std::int64_t workers = std::clamp<std::int64_t>(threads, 1, worthwhile);

  // Each worker walks the whole batch in order and updates the labels that are its own: no two share a bank row, and
  // the updates of one row come in batch order, whatever the number of workers.
  parallel_for(workers, 1, threads, [=](std::int64_t worker, std::int64_t) {
    const auto next_own = [=](std::int64_t i) {
      for (; i < batch; ++i) {
        if (labels[i] >= 0 && labels[i] < bank_rows && labels[i] % workers == worker) break;
      }
      return i;
    };
    for (std::int64_t i = next_own(0), next; i < batch; i = next) {
      next = next_own(i + 1);
      update(bank + labels[i] * width, features + i * width, bank + labels[next < batch ? next : i] * width,
             momentum ? momentum[i] : shared_momentum, width, normalize);
    }
  });
}

template void memory_update(float*, const float*, const std::int64_t*, const float*, double, std::int64_t, std::int64_t,
                            std::int64_t, bool, int);
template void memory_update(double*, const double*, const std::int64_t*, const double*, double, std::int64_t,
                            std::int64_t, std::int64_t, bool, int);

}  // namespace engine

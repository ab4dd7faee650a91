// Sinkhorn's iteration on the CPU. Semantics: engine/ops/sinkhorn.py.
#pragma once

#include <cstdint>

namespace engine {

struct SinkhornSettings {
  double reg;
  double relax;  // 0 where columns have their marginal
  std::int64_t max_iter;
  double tol;
};

// cost [problems, rows, columns], log_a [problems, rows], log_b [problems, columns] in; log_u and log_v of the sizes of
// log_a and log_b, iterations [problems] and error [problems] out; all contiguous. Each problem stops for itself. The
// result does not depend on `threads`.
template <typename Real>
void sinkhorn(const Real* cost, const Real* log_a, const Real* log_b, std::int64_t problems, std::int64_t rows,
              std::int64_t columns, const SinkhornSettings& settings, Real* log_u, Real* log_v,
              std::int64_t* iterations, Real* error, int threads);

}  // namespace engine

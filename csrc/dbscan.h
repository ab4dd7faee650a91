// DBSCAN of a sparse distance matrix on the CPU. Semantics: engine/ops/dbscan.py.
#pragma once

#include <cstdint>

namespace engine {

// A symmetric [count, count] CSR matrix: starts [count + 1], columns, values. A column outside [0, count) is skipped.
// Writes labels [count], the same for any
// `threads`.
template <typename Real>
void dbscan(const std::int64_t* starts, const std::int64_t* columns, const Real* values, std::int64_t* labels,
            std::int64_t count, double eps, std::int64_t min_samples, int threads);

}  // namespace engine

// Means of the rows that share a label, on the CPU. Semantics: engine/ops/segment_mean.py.
#pragma once

#include <cstdint>

#include "rows.h"

namespace engine {

// `row_count` features with their labels [row_count] in, means [segments, width] out, contiguous. A label outside
// [0, segments) is skipped.
//
// Runs on one thread, as fast as rows come from memory in their order. Threads that share the rows by label or by
// column would each read with gaps, which took longer.
template <typename Real>
void segment_mean(const StoredRows<Real>& features, const std::int64_t* labels, std::int64_t row_count,
                  std::int64_t segments, Real* means);

}  // namespace engine

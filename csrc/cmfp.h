// Cross-modality feature propagation on the CPU. Semantics: engine/ops/cmfp.py.
#pragma once

#include <cstdint>

#include "rows.h"

namespace engine {

// Some consecutive rows of a modality.
struct Run {
  std::int64_t first, count;
};

// new_vis [vis_run.count, width] and new_ir [ir_run.count, width] come filled with zeros; the rows that are asked for
// are the same to the bit, whichever others are. The result does not depend on `threads`.
template <typename Real>
void cmfp(const StoredRows<Real>& vis, const StoredRows<Real>& ir, std::int64_t vis_count, std::int64_t ir_count,
          Run vis_run, Run ir_run, std::int64_t k, bool normalize, Real* new_vis, Real* new_ir, int threads);

}  // namespace engine

// Cross-modality feature propagation on the CPU. Semantics: engine/ops/cmfp.py.
#pragma once

#include <cstdint>

#include "rows.h"

namespace engine {

// new_vis [vis_count, width] and new_ir [ir_count, width] come filled with zeros. The result does not depend on
// `threads`.
template <typename Real>
void cmfp(const StoredRows<Real>& vis, const StoredRows<Real>& ir, std::int64_t vis_count, std::int64_t ir_count,
          std::int64_t k, bool normalize, Real* new_vis, Real* new_ir, int threads);

}  // namespace engine

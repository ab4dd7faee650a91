// The momentum update of a memory bank on the CPU. Semantics: engine/ops/memory_update_.py.
#pragma once

#include <cstdint>

namespace engine {

// bank [bank_rows, width], features [batch, width], labels [batch], all contiguous; momentum [batch], or null where all
// features share one. A label outside [0, bank_rows) is skipped. The result does not depend on `threads`.
template <typename Real>
void memory_update(Real* bank, const Real* features, const std::int64_t* labels, const Real* momentum,
                   double shared_momentum, std::int64_t bank_rows, std::int64_t batch, std::int64_t width,
                   bool normalize, int threads);

}  // namespace engine

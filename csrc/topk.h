// The k largest inner products of rows on the CPU. Semantics: engine/ops/topk.py.
#pragma once

#include <cstdint>

namespace engine {

// queries [query_count, width], bank [bank_count, width], values and indices [query_count, k], all contiguous. Where
// `queries` and `bank` are the same rows, every product is computed once. The result does not depend on `threads`.
template <typename Real>
void topk(const Real* queries, const Real* bank, std::int64_t query_count, std::int64_t bank_count, std::int64_t width,
          std::int64_t k, bool exclude_self, Real* values, std::int64_t* indices, int threads);

}  // namespace engine

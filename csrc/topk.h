// The k largest inner products of rows on the CPU. Semantics: engine/ops/topk.py.
#pragma once

#include <cstdint>

#include "rows.h"

namespace engine {

// values and indices [query_count, k]. Where `queries` and `bank` are the same rows, every product is computed once.
// The result does not depend on `threads`.
template <typename Real>
void topk(const StoredRows<Real>& queries, const StoredRows<Real>& bank, std::int64_t query_count,
          std::int64_t bank_count, std::int64_t k, bool exclude_self, Real* values, std::int64_t* indices, int threads);

}  // namespace engine

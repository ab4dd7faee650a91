// Rows of features averaged over a graph, on the CPU. Semantics: engine/ops/propagate.py.
#pragma once

#include <cstdint>

#include "rows.h"

namespace engine {

// Row i owns the entries [starts[i], starts[i + 1]) of columns and values. Row bounds lie within these arrays; one that
// ends before it begins is empty, and an entry whose column is not in [0, column_count) counts as not stored.
template <typename Real>
struct Graph {
  const std::int64_t* starts;
  const std::int64_t* columns;
  const Real* values;
  std::int64_t row_count;
  std::int64_t column_count;
};

// target[i] += sum_j graph_ij features[j], target [row_count, width], features [column_count, width]. Only rows that
// the graph names are read. The result does not depend on `threads`.
template <typename Real>
void propagate(const Graph<Real>& graph, const StoredRows<Real>& features, Real* target, int threads);

}  // namespace engine

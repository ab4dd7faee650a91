// The k-reciprocal Jaccard distance on the CPU, after the search for neighbours. Semantics: engine/ops/jaccard.py.
#pragma once

#include <cstdint>
#include <vector>

#include "neighbors.h"

namespace engine {

// Sparse rows: row i owns the entries [starts[i], starts[i + 1]) of columns, ascending, and values.
template <typename Value>
struct Rows {
  std::vector<std::int64_t> starts{0};
  std::vector<Node> columns;
  std::vector<Value> values;

  void append(Node column, Value value) {
    columns.push_back(column);
    values.push_back(value);
  }
  void end_row() { starts.push_back(static_cast<std::int64_t>(columns.size())); }
};

// Computes at construction; then tells how many entries the matrix stores, and writes them to where there is room.
template <typename Real>
class Jaccard {
 public:
  // features [count, width]; neighbors [count, k1], the nearest first (an index outside [0, count) is skipped). The
  // first `half` of a row's neighbours decide about the expansion of sets, the first `k2` are averaged. The result
  // does not depend on `threads`.
  Jaccard(const Real* features, const std::int64_t* neighbors, std::int64_t count, std::int64_t width, std::int64_t k1,
          std::int64_t half, std::int64_t k2, int threads);

  std::int64_t entry_count() const;

  // CSR: starts [count + 1], columns and values [entry_count()].
  void write(std::int64_t* starts, std::int64_t* columns, Real* values, int threads) const;

 private:
  std::vector<Rows<Real>> blocks_;  // the distances below 1, a block of rows each
};

}  // namespace engine

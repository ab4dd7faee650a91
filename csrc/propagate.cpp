#include "propagate.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vectors.h"

namespace engine {
namespace {

constexpr std::int64_t kRowsPerTask = 64;

// All named rows are read a slice of columns at a time, copied together: it stays in the cache that cores share while
// every row of the result collects from it.
constexpr std::int64_t kSliceBytes = 16 << 20;
constexpr std::int64_t kLeastSliceBytes = 512;  // of one row

// Vectors of a row's sums that stay in registers.
constexpr int kVectors = 8;
constexpr std::int64_t kCacheLine = 64;

// The graph without entries that name no row of the features.
template <typename Real>
struct Entries {
  struct Entry {
    std::int64_t place;  // of the row, among those that are named
    Real value;
  };
  std::vector<std::int64_t> named;   // rows of the features, ascending
  std::vector<std::int64_t> starts;  // [row_count + 1]
  std::vector<Entry> list;
};

template <typename Real, typename Visit>
void for_each_entry(const Graph<Real>& graph, std::int64_t row, const Visit& visit) {
  for (std::int64_t entry = graph.starts[row]; entry < graph.starts[row + 1]; ++entry) {
    const std::int64_t column = graph.columns[entry];
    if (column >= 0 && column < graph.column_count) visit(column, graph.values[entry]);
  }
}

template <typename Real>
Entries<Real> entries_of(const Graph<Real>& graph) {
  Entries<Real> entries;
  std::vector<std::int64_t> place(static_cast<std::size_t>(graph.column_count), -1);
  entries.starts.push_back(0);
  for (std::int64_t row = 0; row < graph.row_count; ++row) {
    for_each_entry(graph, row, [&](std::int64_t column, Real value) {
      place[column] = 0;
      entries.list.push_back({column, value});
    });
    entries.starts.push_back(static_cast<std::int64_t>(entries.list.size()));
  }
  for (std::int64_t column = 0; column < graph.column_count; ++column) {
    if (place[column] < 0) continue;
    place[column] = static_cast<std::int64_t>(entries.named.size());
    entries.named.push_back(column);
  }
  for (auto& entry : entries.list) entry.place = place[entry.place];
  return entries;
}

// The slice of the features: `count` columns of the named rows, one row every `stride` entries.
template <typename Real>
struct Slice {
  const Real* rows;
  std::int64_t stride;
  std::int64_t count;
};

template <typename Vector, typename Real>
ENGINE_INLINE void store_part(Real* target, Vector vector, std::int64_t count) {
  std::memcpy(target, &vector, static_cast<std::size_t>(count) * sizeof(Real));
}

// One row of the result, `count` entries of it.
template <typename Real, int kBytes>
ENGINE_INLINE void collect_with(const typename Entries<Real>::Entry* begin, const typename Entries<Real>::Entry* end,
                                const Slice<Real>& slice, Real* target) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  constexpr std::int64_t kLanes = VectorOf<Real, kBytes>::kLanes;
  std::int64_t column = 0;
  for (; column + kVectors * kLanes <= slice.count; column += kVectors * kLanes) {
    Vector sums[kVectors];
    for (int part = 0; part < kVectors; ++part) sums[part] = load<Vector>(target + column + part * kLanes);
    for (const auto* entry = begin; entry < end; ++entry) {
      const Real* row = slice.rows + entry->place * slice.stride + column;
      for (int part = 0; part < kVectors; ++part) sums[part] += entry->value * load<Vector>(row + part * kLanes);
    }
    for (int part = 0; part < kVectors; ++part) store(target + column + part * kLanes, sums[part]);
  }
  for (; column < slice.count; column += kLanes) {
    const std::int64_t count = std::min(kLanes, slice.count - column);
    Vector sum = load_part<Vector>(target + column, count, Real(0));
    for (const auto* entry = begin; entry < end; ++entry) {
      sum += entry->value * load<Vector>(slice.rows + entry->place * slice.stride + column);
    }
    store_part(target + column, sum, count);
  }
}

template <typename Real>
using Collect = void (*)(const typename Entries<Real>::Entry* begin, const typename Entries<Real>::Entry* end,
                         const Slice<Real>& slice, Real* target);

template <typename Real>
void collect_portable(const typename Entries<Real>::Entry* begin, const typename Entries<Real>::Entry* end,
                      const Slice<Real>& slice, Real* target) {
  collect_with<Real, 16>(begin, end, slice, target);
}

#ifdef ENGINE_X86
template <typename Real>
ENGINE_AVX2 void collect_avx2(const typename Entries<Real>::Entry* begin, const typename Entries<Real>::Entry* end,
                              const Slice<Real>& slice, Real* target) {
  collect_with<Real, 32>(begin, end, slice, target);
}

template <typename Real>
ENGINE_AVX512 void collect_avx512(const typename Entries<Real>::Entry* begin, const typename Entries<Real>::Entry* end,
                                  const Slice<Real>& slice, Real* target) {
  collect_with<Real, 64>(begin, end, slice, target);
}
#endif

template <typename Real>
Collect<Real> pick_collect() {
#ifdef ENGINE_X86
  if (isa() == Isa::avx512) return collect_avx512<Real>;
  if (isa() == Isa::avx2) return collect_avx2<Real>;
#endif
  return collect_portable<Real>;
}

}  // namespace

template <typename Real>
void propagate(const Graph<Real>& graph, const StoredRows<Real>& features, Real* target, int threads) {
  const Collect<Real> collect = pick_collect<Real>();
  const Entries<Real> entries = entries_of(graph);
  const auto named_count = static_cast<std::int64_t>(entries.named.size());
  if (named_count == 0) return;

  constexpr std::int64_t kStep = kLeastSliceBytes / sizeof(Real);
  const std::int64_t width = features.width();
  const std::int64_t fitting = kSliceBytes / static_cast<std::int64_t>(sizeof(Real)) / named_count / kStep * kStep;
  const std::int64_t stride = std::clamp(fitting, kStep, (width + kStep - 1) / kStep * kStep);
  std::vector<Real> rows(static_cast<std::size_t>(named_count * stride));
  for (std::int64_t first = 0; first < width; first += stride) {
    const Slice<Real> slice{rows.data(), stride, std::min(stride, width - first)};
    parallel_for(named_count, kRowsPerTask, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t place = begin; place < end; ++place) {
        features.read(entries.named[place], first, slice.count, rows.data() + place * stride);
      }
    });
    parallel_for(graph.row_count, kRowsPerTask, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        collect(entries.list.data() + entries.starts[row], entries.list.data() + entries.starts[row + 1], slice,
                target + row * width + first);
      }
    });
  }
}

template void propagate(const Graph<float>&, const StoredRows<float>&, float*, int);
template void propagate(const Graph<double>&, const StoredRows<double>&, double*, int);

}  // namespace engine

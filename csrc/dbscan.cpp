#include "dbscan.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "components.h"
#include "parallel.h"

namespace engine {
namespace {

constexpr std::int64_t kNoise = -1;
constexpr std::int64_t kRowsPerBlock = 1024;

// Most of what is stored is no neighbour: entries are first looked at by this many.
constexpr std::int64_t kLanes = 16;

template <typename Real>
bool any_within(const Real* values, Real radius) {
  int within = 0;
  for (std::int64_t lane = 0; lane < kLanes; ++lane) within |= values[lane] <= radius;
  return within != 0;
}

// The neighbours of some rows, without the rows themselves: of the r-th those up to ends[r].
struct Neighbors {
  std::vector<std::int64_t> columns;
  std::vector<std::size_t> ends;
};

template <typename Real>
Neighbors find_neighbors(const std::int64_t* starts, const std::int64_t* columns, const Real* values,
                         std::int64_t begin, std::int64_t end, std::int64_t count, Real radius) {
  Neighbors found;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t last = starts[row + 1];
    for (std::int64_t entry = starts[row]; entry < last;) {
      if (entry + kLanes <= last && !any_within(values + entry, radius)) {
        entry += kLanes;
        continue;
      }
      for (const std::int64_t stop = std::min(last, entry + kLanes); entry < stop; ++entry) {
        const std::int64_t other = columns[entry];
        if (values[entry] <= radius && other != row && other >= 0 && other < count) found.columns.push_back(other);
      }
    }
    found.ends.push_back(found.columns.size());
  }
  return found;
}

}  // namespace

template <typename Real>
void dbscan(const std::int64_t* starts, const std::int64_t* columns, const Real* values, std::int64_t* labels,
            std::int64_t count, double eps, std::int64_t min_samples, int threads) {
  std::vector<Neighbors> blocks(static_cast<std::size_t>((count + kRowsPerBlock - 1) / kRowsPerBlock));
  parallel_for(count, kRowsPerBlock, threads, [&](std::int64_t begin, std::int64_t end) {
    blocks[begin / kRowsPerBlock] = find_neighbors(starts, columns, values, begin, end, count, static_cast<Real>(eps));
  });
  // Calls visit(row, first neighbour, end of neighbours) for all rows in order.
  const auto each_row = [&](const auto& visit) {
    std::int64_t row = 0;
    for (const Neighbors& block : blocks) {
      const std::int64_t* first = block.columns.data();
      for (const std::size_t end : block.ends) {
        visit(row++, first, block.columns.data() + end);
        first = block.columns.data() + end;
      }
    }
  };

  std::vector<char> is_core(static_cast<std::size_t>(count));
  std::vector<std::int64_t> parents(static_cast<std::size_t>(count));
  std::iota(parents.begin(), parents.end(), 0);
  each_row([&](std::int64_t row, const std::int64_t* first, const std::int64_t* end) {
    is_core[row] = end - first + 1 >= min_samples;
    if (!is_core[row]) return;
    // The edges to lower rows: of a symmetric matrix that is every edge once.
    for (; first < end; ++first) {
      if (*first < row && is_core[*first]) unite(parents.data(), row, *first);
    }
  });

  std::int64_t cluster_count = 0;
  for (std::int64_t row = 0; row < count; ++row) {
    if (!is_core[row]) continue;
    const std::int64_t root = find_root(parents.data(), row);
    labels[row] = root == row ? cluster_count++ : labels[root];  // the root is the lowest of them
  }
  each_row([&](std::int64_t row, const std::int64_t* first, const std::int64_t* end) {
    if (is_core[row]) return;
    std::int64_t cluster = cluster_count;
    for (; first < end; ++first) {
      if (is_core[*first]) cluster = std::min(cluster, labels[*first]);
    }
    labels[row] = cluster < cluster_count ? cluster : kNoise;
  });
}

template void dbscan(const std::int64_t*, const std::int64_t*, const float*, std::int64_t*, std::int64_t, double,
                     std::int64_t, int);
template void dbscan(const std::int64_t*, const std::int64_t*, const double*, std::int64_t*, std::int64_t, double,
                     std::int64_t, int);

}  // namespace engine

// DBSCAN of a sparse distance matrix on the GPU. Semantics: engine/ops/dbscan.py.
//
// A warp has a row of a symmetric [count, count] CSR matrix: starts [count + 1], columns, and of every entry whether it
// is near enough. A column outside [0, count) is skipped. parents [count]: trees of cores, -1 for other rows.
#include "block.h"
#include "components.h"

namespace {

using engine::kWarpThreads;
using engine::kWholeWarp;

constexpr std::int64_t kNoCore = -1;

__device__ std::int64_t warp_row() {
  return (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpThreads;
}

__device__ int lane() { return threadIdx.x % kWarpThreads; }

__device__ bool is_neighbor(const std::int64_t* columns, const bool* near, std::int64_t entry, std::int64_t row,
                            std::int64_t count) {
  return near[entry] && columns[entry] != row && columns[entry] >= 0 && columns[entry] < count;
}

}  // namespace

// Every core becomes a tree of its own.
extern "C" __global__ void dbscan_core_kernel(const std::int64_t* starts, const std::int64_t* columns, const bool* near,
                                              std::int64_t count, std::int64_t min_samples, std::int64_t* parents) {
  const std::int64_t row = warp_row();
  if (row >= count) return;
  const std::int64_t end = starts[row + 1];
  std::int64_t found = 1;  // itself
  for (std::int64_t first = starts[row]; first < end; first += kWarpThreads) {
    const std::int64_t entry = first + lane();
    found += __popc(__ballot_sync(kWholeWarp, entry < end && is_neighbor(columns, near, entry, row, count)));
  }
  if (lane() == 0) parents[row] = found >= min_samples ? row : kNoCore;
}

// Cores that are neighbours come into one tree. The edges to lower rows do: of a symmetric matrix that is every edge
// once. How the trees look hangs on which thread is first, their roots do not: the lowest core of each component.
extern "C" __global__ void dbscan_unite_kernel(const std::int64_t* starts, const std::int64_t* columns,
                                               const bool* near, std::int64_t count, std::int64_t* parents) {
  const std::int64_t row = warp_row();
  if (row >= count || parents[row] == kNoCore) return;
  for (std::int64_t entry = starts[row] + lane(); entry < starts[row + 1]; entry += kWarpThreads) {
    const std::int64_t other = columns[entry];
    if (other < row && is_neighbor(columns, near, entry, row, count) && parents[other] != kNoCore) {
      engine::unite(parents, row, other);
    }
  }
}

// clusters [count]: one more than the number of the cluster that a root begins. labels [count].
extern "C" __global__ void dbscan_label_kernel(const std::int64_t* starts, const std::int64_t* columns,
                                               const bool* near, const std::int64_t* clusters, std::int64_t count,
                                               std::int64_t* parents, std::int64_t* labels) {
  const std::int64_t row = warp_row();
  if (row >= count) return;
  std::int64_t root = count;  // the lowest that the row can join, as the first cluster has the lowest root
  if (parents[row] != kNoCore) {
    root = engine::find_root(parents, row);
  } else {
    for (std::int64_t entry = starts[row] + lane(); entry < starts[row + 1]; entry += kWarpThreads) {
      if (!is_neighbor(columns, near, entry, row, count) || parents[columns[entry]] == kNoCore) continue;
      const std::int64_t candidate = engine::find_root(parents, columns[entry]);
      root = candidate < root ? candidate : root;
    }
    for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
      const std::int64_t candidate = __shfl_xor_sync(kWholeWarp, root, lanes);
      root = candidate < root ? candidate : root;
    }
  }
  if (lane() == 0) labels[row] = root < count ? clusters[root] - 1 : -1;
}

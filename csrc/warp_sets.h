// Sets of indices, a warp per row: the GPU's form of the rules in sets.h. All lanes must call all functions.
#pragma once

#include "block.h"
#include "host_device.h"
#include "sets.h"

namespace engine {

// A row's room for `count` entries: shared memory, or its part of `scratch` where that is not null.
__device__ inline std::int64_t* room_of_row(std::int64_t* scratch, std::int64_t count) {
  extern __shared__ std::int64_t shared_entries[];
  return scratch ? scratch + blockIdx.x * count : shared_entries;
}

__device__ inline void copy_row(const std::int64_t* row, std::int64_t count, std::int64_t* target) {
  for (std::int64_t place = threadIdx.x; place < count; place += kWarpThreads) target[place] = row[place];
}

// Sorts in place, negative entries last: as unsigned numbers they are the largest.
__device__ inline void sort_padded(std::int64_t* entries, std::int64_t count) {
  __syncwarp();
  merge_exchange(count, [=](std::int64_t part, std::int64_t first, std::int64_t distance) {
    for (std::int64_t place = threadIdx.x; place + distance < count; place += kWarpThreads) {
      if ((place & part) != first) continue;
      const std::int64_t one = entries[place], other = entries[place + distance];
      if (static_cast<std::uint64_t>(other) < static_cast<std::uint64_t>(one)) {
        entries[place] = other;
        entries[place + distance] = one;
      }
    }
    __syncwarp();
  });
}

// Whether a sorted row holds an entry that is no padding.
__device__ inline bool contains(const std::int64_t* sorted, std::int64_t count, std::int64_t entry) {
  std::int64_t begin = 0, end = count;
  while (begin < end) {
    const std::int64_t middle = (begin + end) / 2;
    if (static_cast<std::uint64_t>(sorted[middle]) < static_cast<std::uint64_t>(entry)) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin < count && sorted[begin] == entry;
}

// Writes the entries of a sorted row that `belongs` takes, each once, then padding up to `width`.
template <typename Belongs>
__device__ void write_set(const std::int64_t* sorted, std::int64_t count, const Belongs& belongs, std::int64_t* target,
                          std::int64_t width) {
  const unsigned before = (1u << threadIdx.x) - 1;  // the lanes before this one
  std::int64_t size = 0;
  for (std::int64_t begin = 0; begin < count; begin += kWarpThreads) {
    const std::int64_t place = begin + threadIdx.x;
    const std::int64_t entry = place < count ? sorted[place] : -1;
    const bool kept = entry >= 0 && (place == 0 || sorted[place - 1] != entry) && belongs(entry);
    const unsigned all = __ballot_sync(kWholeWarp, kept);
    if (kept) target[size + __popc(all & before)] = entry;
    size += __popc(all);
  }
  for (std::int64_t place = size + threadIdx.x; place < width; place += kWarpThreads) target[place] = -1;
}

}  // namespace engine

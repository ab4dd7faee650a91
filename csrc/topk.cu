// The largest of the products of rows with rows, on the GPU. Semantics: engine/ops/topk.py.
//
// A candidate is one number, the greater the better it is: the value in its upper half, in bits that ascend as values
// do and are the greatest for NaN, below them the row of the bank, the lower the greater. No two candidates of a query
// are the same number, so which ones are the best hangs on no order.
#include "block.h"
#include "host_device.h"
#include "sets.h"
#include "storage.h"

namespace {

using engine::kBlockThreads;
using Candidate = std::uint64_t;

constexpr Candidate kNoCandidate = 0;  // below that of -inf
constexpr std::uint32_t kAllBits = 0xffffffffu;
constexpr int kValues = 4;  // that a thread looks at between two meetings of the block

__device__ Candidate candidate_of(float value, std::int64_t row) {
  const Candidate bits = engine::ascending_bits(value);
  return bits << 32 | (kAllBits - static_cast<std::uint32_t>(row));
}

__device__ float value_of(Candidate candidate) {
  return engine::float_of_ascending_bits(static_cast<std::uint32_t>(candidate >> 32));
}

__device__ std::int64_t row_of(Candidate candidate) { return kAllBits - static_cast<std::uint32_t>(candidate); }

// The best first. All threads must call it.
__device__ void sort(Candidate* candidates, std::int64_t count) {
  engine::merge_exchange(count, [=](std::int64_t part, std::int64_t first, std::int64_t distance) {
    for (std::int64_t place = threadIdx.x; place + distance < count; place += kBlockThreads) {
      if ((place & part) != first) continue;
      const Candidate one = candidates[place], other = candidates[place + distance];
      if (one < other) {
        candidates[place] = other;
        candidates[place + distance] = one;
      }
    }
    __syncthreads();
  });
}

}  // namespace

// Offers the products [blocks, columns] of queries from first_query on with rows of the bank from first_row on. The
// first `kept` of each query's `k` entries of `best` are its best candidates so far, in order, before and after. A
// block has a query, and 2 * kept + kValues * kBlockThreads entries of shared memory.
extern "C" __global__ void __launch_bounds__(kBlockThreads)
    topk_select_kernel(const float* products, std::int64_t columns, std::int64_t first_query, std::int64_t first_row,
                       bool exclude_self, std::int64_t k, std::int64_t kept, Candidate* best) {
  extern __shared__ Candidate candidates[];
  __shared__ int size;
  const std::int64_t query = first_query + blockIdx.x;
  products += blockIdx.x * columns;
  best += query * k;
  for (std::int64_t place = threadIdx.x; place < kept; place += kBlockThreads) candidates[place] = best[place];
  if (threadIdx.x == 0) size = static_cast<int>(kept);
  __syncthreads();

  Candidate worst = candidates[kept - 1];
  bool changed = false;
  for (std::int64_t begin = threadIdx.x; begin - threadIdx.x < columns; begin += kValues * kBlockThreads) {
    float values[kValues];  // all on their way before the first is looked at
    for (int i = 0; i < kValues; ++i) {
      const std::int64_t column = begin + i * kBlockThreads;
      values[i] = column < columns ? products[column] : 0;
    }
    bool found = false;
    for (int i = 0; i < kValues; ++i) {
      const std::int64_t column = begin + i * kBlockThreads, row = first_row + column;
      const Candidate candidate = candidate_of(values[i], row);
      if (column >= columns || candidate < worst || (exclude_self && row == query)) continue;
      candidates[atomicAdd(&size, 1)] = candidate;
      found = true;
    }
    if (!__syncthreads_or(found)) continue;
    changed = true;
    const int count = size;
    __syncthreads();  // before it grows again
    if (count <= 2 * kept) continue;
    sort(candidates, count);
    worst = candidates[kept - 1];
    if (threadIdx.x == 0) size = static_cast<int>(kept);
    __syncthreads();
  }
  if (!changed) return;
  sort(candidates, size);
  for (std::int64_t place = threadIdx.x; place < kept; place += kBlockThreads) best[place] = candidates[place];
}

// From candidates [count] to their values and, in place, the rows of the bank: -inf and -1 for none.
extern "C" __global__ void __launch_bounds__(kBlockThreads)
    topk_write_kernel(std::int64_t count, std::int64_t* entries, float* values) {
  const std::int64_t place = blockIdx.x * static_cast<std::int64_t>(kBlockThreads) + threadIdx.x;
  if (place >= count) return;
  const Candidate candidate = static_cast<Candidate>(entries[place]);
  const bool none = candidate == kNoCandidate;
  values[place] = none ? engine::float_of_bits(0xff800000u) : value_of(candidate);
  entries[place] = none ? -1 : row_of(candidate);
}

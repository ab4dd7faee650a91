// What the threads of a warp or of a block do together.
#pragma once

namespace engine {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kBlockThreads = 256;  // of every kernel that uses block_...
constexpr int kBlockWarps = kBlockThreads / kWarpThreads;

// The sum over a warp, the same bits in every lane: of halves, quarters, ...
template <typename Value>
__device__ Value warp_sum(Value value) {
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kWholeWarp, value, lanes);
  return value;
}

// The sum over a block, the same bits in every thread. All threads must call it.
template <typename Value>
__device__ Value block_sum(Value value) {
  __shared__ Value parts[kBlockWarps];
  const int lane = threadIdx.x % kWarpThreads;
  value = warp_sum(value);
  if (lane == 0) parts[threadIdx.x / kWarpThreads] = value;
  __syncthreads();
  value = warp_sum(lane < kBlockWarps ? parts[lane] : Value(0));
  __syncthreads();  // before the next sum overwrites the parts
  return value;
}

// The first thread of a block that says yes, kBlockThreads where none does. All threads must call it.
__device__ inline int first_thread(bool yes) {
  __shared__ int firsts[kBlockWarps];
  const int warp = threadIdx.x / kWarpThreads;
  const int lane = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, yes))) - 1;  // -1 for none
  if (threadIdx.x % kWarpThreads == 0) firsts[warp] = lane < 0 ? kBlockThreads : warp * kWarpThreads + lane;
  __syncthreads();
  int first = kBlockThreads;
  for (int other = kBlockWarps - 1; other >= 0; --other) {
    if (firsts[other] < kBlockThreads) first = firsts[other];
  }
  __syncthreads();  // before the next search overwrites the answers
  return first;
}

}  // namespace engine

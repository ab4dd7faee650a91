// Sinkhorn's iteration in the log domain on the GPU, for a batch of problems. Semantics: engine/ops/sinkhorn.py.
//
// One cooperative launch makes all iterations. In each, blocks take the row step of chunks of rows and leave the column
// sums of their part of the plan; after a barrier of the grid they add those, chunk after chunk, and propose log_v;
// after another one each block finds the error of the problems it goes on with. Entries of the plan are at most 1, so
// their sums need no maximum; a column so small that its sum is lost is summed once more in the log domain.
#include "block.h"
#include "host_device.h"
#include "storage.h"

namespace {

using engine::kBlockThreads;
using engine::kBlockWarps;
using engine::kWarpThreads;
using engine::kWholeWarp;
using engine::warp_sum;

constexpr int kPieces = 32;                    // columns that a lane has of a slab, in registers
constexpr int kSlab = kPieces * kWarpThreads;  // columns of a row visited at a time
constexpr float kLeast = 1e-30f;               // below it a column sum may have lost entries

struct Sizes {
  std::int64_t problems, rows, columns;
  std::int64_t chunk_rows;

  __device__ std::int64_t chunks() const { return (rows + chunk_rows - 1) / chunk_rows; }
  __device__ std::int64_t column_blocks() const { return (columns + kWarpThreads - 1) / kWarpThreads; }
};

__device__ float infinity() { return engine::float_of_bits(0x7f800000u); }

__device__ int lane() { return threadIdx.x % kWarpThreads; }

__device__ int warp() { return threadIdx.x / kWarpThreads; }

// NaN where one of them is.
__device__ float larger(float one, float other) { return one > other || one != one ? one : other; }

__device__ float warp_max(float value) {
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
    value = larger(value, __shfl_xor_sync(kWholeWarp, value, lanes));
  }
  return value;
}

// What one term e^(value - most) of a sum becomes when the largest value is -inf: 0, not NaN.
__device__ float shift_of(float most) { return most == -infinity() ? 0.0f : most; }

// Waits until all blocks are here, and sees what they wrote. `awaited` counts the arrivals of all barriers so far.
__device__ void wait_for_grid(unsigned* arrived, unsigned& awaited) {
  awaited += gridDim.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (static_cast<int>(*static_cast<volatile unsigned*>(arrived) - awaited) < 0) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// log_v - (cost - offset) / reg of a slab of a row, -inf beyond the columns.
template <typename Stored>
__device__ void load_scores(float (&scores)[kPieces], const Stored* cost, float offset, const float* log_v,
                            std::int64_t first, std::int64_t columns, float inverse_reg) {
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const std::int64_t column = first + piece * kWarpThreads + lane();
    scores[piece] = -infinity();
    if (column < columns) scores[piece] = log_v[column] - (static_cast<float>(cost[column]) - offset) * inverse_reg;
  }
}

// The row step of rows [begin, end) of a problem, and the sums of their columns into partial [columns]. A warp has a
// row; up to kSlab columns stay in registers and are read once, and one exponential an entry serves both.
template <typename Stored>
__device__ void visit_rows(const Stored* cost, const float* offset, const float* log_a, const float* log_v,
                           float* log_u, float* partial, std::int64_t begin, std::int64_t end, std::int64_t columns,
                           float inverse_reg) {
  __shared__ float parts[kBlockWarps][kSlab];
  for (std::int64_t first = 0; first < columns; first += kSlab) {
    float sums[kPieces] = {};
    for (std::int64_t row = begin + warp(); row < end; row += kBlockWarps) {
      const Stored* const entries = cost + row * columns;
      float terms[kPieces];
      float factor = 1;
      if (first == 0) {
        float most = -infinity(), total = 0;
        for (std::int64_t slab = 0; slab < columns; slab += kSlab) {
          load_scores(terms, entries, offset[row], log_v, slab, columns, inverse_reg);
          float largest = most;
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) largest = larger(largest, terms[piece]);
          largest = warp_max(largest);
          const float shift = shift_of(largest);
          float sum = 0;
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            terms[piece] = expf(terms[piece] - shift);
            sum += terms[piece];
          }
          total = total * expf(most - shift) + warp_sum(sum);
          most = largest;
        }
        // Where nothing can be sent the row is 0, not log_a / 0.
        if (lane() == 0) log_u[row] = total == 0 ? -infinity() : log_a[row] - most - logf(total);
        factor = total == 0 ? 0.0f : expf(log_a[row]) / total;
      }
      if (columns > kSlab) {
        __syncwarp();  // log_u is the first lane's
        load_scores(terms, entries, offset[row], log_v, first, columns, inverse_reg);
        factor = 1;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) terms[piece] = expf(terms[piece] + log_u[row]);
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) sums[piece] += terms[piece] * factor;
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) parts[warp()][piece * kWarpThreads + lane()] = sums[piece];
    __syncthreads();
    for (int column = threadIdx.x; column < kSlab && first + column < columns; column += kBlockThreads) {
      float sum = 0;
      for (int part = 0; part < kBlockWarps; ++part) sum += parts[part][column];
      partial[first + column] = sum;
    }
    __syncthreads();
  }
}

// log sum_i exp(log_u_i - (cost_i - offset_i) / reg) of the lane's column, by a whole block.
template <typename Stored>
__device__ float sum_column(const Stored* cost, const float* offset, const float* log_u, std::int64_t column,
                            std::int64_t rows, std::int64_t columns, float inverse_reg) {
  __shared__ float mosts[kBlockWarps][kWarpThreads], totals[kBlockWarps][kWarpThreads];
  float most = -infinity(), total = 0;
  for (std::int64_t row = warp(); column < columns && row < rows; row += kBlockWarps) {
    const float score = log_u[row] - (static_cast<float>(cost[row * columns + column]) - offset[row]) * inverse_reg;
    const float largest = larger(most, score), shift = shift_of(largest);
    total = total * expf(most - shift) + expf(score - shift);
    most = largest;
  }
  mosts[warp()][lane()] = most;
  totals[warp()][lane()] = total;
  __syncthreads();
  most = -infinity();
  for (int part = 0; part < kBlockWarps; ++part) most = larger(most, mosts[part][lane()]);
  total = 0;
  for (int part = 0; part < kBlockWarps; ++part) {
    total += totals[part][lane()] * expf(mosts[part][lane()] - shift_of(most));
  }
  __syncthreads();
  return total == 0 ? -infinity() : most + logf(total);
}

// The column step of a lane's column each, the same in all warps of a block, into proposed; the error of these columns
// into *error.
template <typename Stored>
__device__ void step_columns(const Stored* cost, const float* offset, const float* log_b, const float* log_v,
                             const float* log_u, const float* partial, float* proposed, float* error,
                             std::int64_t first, const Sizes& sizes, float inverse_reg, float exponent, bool relaxed) {
  __shared__ float parts[kBlockWarps][kWarpThreads];
  const std::int64_t column = first + lane();
  const bool inside = column < sizes.columns;
  float sum = 0;
#pragma unroll 4
  for (std::int64_t chunk = warp(); inside && chunk < sizes.chunks(); chunk += kBlockWarps) {
    sum += partial[chunk * sizes.columns + column];
  }
  parts[warp()][lane()] = sum;
  __syncthreads();
  sum = 0;
  for (int part = 0; part < kBlockWarps; ++part) sum += parts[part][lane()];

  const float before = inside ? log_v[column] : -infinity(), weight = inside ? log_b[column] : -infinity();
  const bool lost = weight != -infinity() && sum < kLeast;
  float log_column = logf(sum) - shift_of(before);
  if (__any_sync(kWholeWarp, lost)) {
    const float exact = sum_column(cost, offset, log_u, column, sizes.rows, sizes.columns, inverse_reg);
    if (lost) log_column = exact;
  }
  const float after = log_column == -infinity() ? -infinity() : (weight - log_column) * exponent;
  float wrong = 0;
  if (inside && relaxed) {
    wrong = after == before ? 0.0f : fabsf(after - before);
  } else if (inside) {
    wrong = fabsf(expf(before + log_column) - expf(weight));
  }
  wrong = relaxed ? warp_max(wrong) : warp_sum(wrong);
  if (warp() == 0 && inside) proposed[column] = after;
  if (threadIdx.x == 0) *error = wrong;
  __syncthreads();
}

// The error of a problem of those of its column blocks, the same in all threads.
__device__ float sum_errors(const float* errors, std::int64_t count, bool relaxed) {
  float error = 0;
  for (std::int64_t place = lane(); place < count; place += kWarpThreads) {
    error = relaxed ? larger(error, errors[place]) : error + errors[place];
  }
  return relaxed ? warp_max(error) : warp_sum(error);
}

template <typename Stored>
__device__ void iterate(const Stored* cost, const float* offset, const float* log_a, const float* log_b, float* log_u,
                        float* log_v, float* partial, float* errors, float* error, std::int64_t* iterations,
                        bool* active, unsigned* state, const Sizes& sizes, float inverse_reg, float exponent,
                        bool relaxed, float tol, std::int64_t max_iter) {
  const std::int64_t chunks = sizes.chunks(), column_blocks = sizes.column_blocks();
  unsigned *const arrived = state, *const running = state + 1;  // problems that go on, in odd and even iterations
  unsigned awaited = 0;
  for (std::int64_t iteration = 1;; ++iteration) {
    float* const now = log_v + (iteration - 1) % 2 * sizes.problems * sizes.columns;
    float* const next = log_v + iteration % 2 * sizes.problems * sizes.columns;
    for (std::int64_t unit = blockIdx.x; unit < sizes.problems * chunks; unit += gridDim.x) {
      const std::int64_t problem = unit / chunks, begin = unit % chunks * sizes.chunk_rows;
      // A problem that has stopped keeps its errors, and so stays as it is.
      const float found = iteration == 1 ? 0.0f : sum_errors(errors + problem * column_blocks, column_blocks, relaxed);
      const bool goes_on = iteration <= max_iter && (iteration == 1 || found > tol);
      if (begin == 0 && threadIdx.x == 0) {
        error[problem] = found;
        active[problem] = goes_on;
        if (goes_on) {
          iterations[problem] = iteration;
          atomicAdd(running + iteration % 2, 1u);
        }
      }
      if (!goes_on) continue;
      const std::int64_t end = begin + sizes.chunk_rows < sizes.rows ? begin + sizes.chunk_rows : sizes.rows;
      const std::int64_t row = problem * sizes.rows;
      visit_rows(cost + row * sizes.columns, offset + row, log_a + row, now + problem * sizes.columns, log_u + row,
                 partial + unit * sizes.columns, begin, end, sizes.columns, inverse_reg);
    }
    if (iteration > max_iter) return;
    wait_for_grid(arrived, awaited);
    if (static_cast<volatile unsigned*>(running)[iteration % 2] == 0) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) running[(iteration + 1) % 2] = 0;
    for (std::int64_t unit = blockIdx.x; unit < sizes.problems * column_blocks; unit += gridDim.x) {
      const std::int64_t problem = unit / column_blocks, vector = problem * sizes.columns;
      if (!active[problem]) continue;
      const std::int64_t row = problem * sizes.rows;
      step_columns(cost + row * sizes.columns, offset + row, log_b + vector, now + vector, log_u + row,
                   partial + vector * chunks, next + vector, errors + unit, unit % column_blocks * kWarpThreads, sizes,
                   inverse_reg, exponent, relaxed);
    }
    wait_for_grid(arrived, awaited);
  }
}

}  // namespace

// cost [problems, rows, columns]; offset and log_a [problems, rows], log_b [problems, columns] in, all contiguous.
// log_v [2, problems, columns] begins as log_b in its first half; the iteration that was a problem's last used half 0
// if its number is odd, else half 1. log_u [problems, rows], error and iterations [problems] out. Working space:
// partial [problems, chunks, columns], errors [problems, blocks of 32 columns], active [problems], state [3] of zeros.
// All blocks must run at once.
#define ENGINE_SINKHORN(name, Stored)                                                                              \
  extern "C" __global__ void __launch_bounds__(kBlockThreads, 2) sinkhorn_##name##_kernel(                         \
      const Stored* cost, const float* offset, const float* log_a, const float* log_b, float* log_u, float* log_v, \
      float* partial, float* errors, float* error, std::int64_t* iterations, bool* active, unsigned* state,        \
      std::int64_t problems, std::int64_t rows, std::int64_t columns, std::int64_t chunk_rows, float inverse_reg,  \
      float exponent, bool relaxed, float tol, std::int64_t max_iter) {                                            \
    iterate(cost, offset, log_a, log_b, log_u, log_v, partial, errors, error, iterations, active, state,           \
            Sizes{problems, rows, columns, chunk_rows}, inverse_reg, exponent, relaxed, tol, max_iter);            \
  }
ENGINE_EVERY_STORAGE(ENGINE_SINKHORN)

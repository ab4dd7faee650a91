// The momentum update of a memory bank on the GPU. Semantics: engine/ops/memory_update_.py.
#include "block.h"
#include "host_device.h"

namespace engine {
namespace {

constexpr int kHeld = 8;  // columns of a row that a thread keeps in registers

// The first place in [begin, end) with this label, or `end`. All threads of the block must call it.
__device__ std::int64_t find_label(const std::int64_t* labels, std::int64_t begin, std::int64_t end,
                                   std::int64_t label) {
  for (; begin < end; begin += kBlockThreads) {
    const std::int64_t place = begin + threadIdx.x;
    const int first = first_thread(place < end && labels[place] == label);
    if (first < kBlockThreads) return begin + first;
  }
  return end;
}

}  // namespace
}  // namespace engine

// A block per problem and place of its batch. That of the first feature of a label carries the row through all features
// of the label, in batch order; the others end. Of each problem: bank [bank_rows, width], `bank_stride` entries after
// that of the one before, and features [batch, width], labels [batch], contiguous; momentum [batch], or null where all
// features of all problems share one. A label outside [0, bank_rows) is skipped.
//
// `order` is null, or holds, of each problem, the places of the batch sorted by label and then by place; `labels` are
// sorted with them, so that a label's features need not be looked for.
extern "C" __global__ void __launch_bounds__(engine::kBlockThreads)
    memory_update_kernel(float* bank, const float* features, const std::int64_t* labels, const std::int64_t* order,
                         const float* momentum, float shared_momentum, std::int64_t bank_stride, std::int64_t bank_rows,
                         std::int64_t batch, std::int64_t width, bool normalize) {
  using engine::kBlockThreads;
  using engine::kHeld;
  const std::uint32_t places = static_cast<std::uint32_t>(batch);  // as many as there are blocks at most
  const std::int64_t problem = blockIdx.x / places, own = blockIdx.x % places;
  bank += problem * bank_stride;
  features += problem * batch * width;
  labels += problem * batch;
  if (order) order += problem * batch;
  if (momentum) momentum += problem * batch;
  const std::int64_t label = labels[own];
  if (label < 0 || label >= bank_rows) return;
  if (order ? own > 0 && labels[own - 1] == label : engine::find_label(labels, 0, own, label) < own) return;

  // A thread's columns are its own from the first feature to the last; those beyond the registers stay in the bank.
  float* const row = bank + label * width;
  float held[kHeld];
  for (int part = 0; part < kHeld; ++part) {
    const std::int64_t column = part * kBlockThreads + threadIdx.x;
    held[part] = column < width ? row[column] : 0.0f;
  }
  for (std::int64_t place = own; place < batch;) {
    const std::int64_t source = order ? order[place] : place;
    const float* const feature = features + source * width;
    const float kept = momentum ? momentum[source] : shared_momentum, added = 1 - kept;
    float squares = 0;
    for (int part = 0; part < kHeld; ++part) {
      const std::int64_t column = part * kBlockThreads + threadIdx.x;
      if (column < width) held[part] = held[part] * kept + feature[column] * added;
      squares += held[part] * held[part];
    }
    for (std::int64_t column = kHeld * kBlockThreads + threadIdx.x; column < width; column += kBlockThreads) {
      row[column] = row[column] * kept + feature[column] * added;
      squares += row[column] * row[column];
    }
    const float norm = normalize ? sqrtf(engine::block_sum(squares)) : 0.0f;
    if (norm > 0) {
      const float factor = 1 / norm;
      for (int part = 0; part < kHeld; ++part) held[part] *= factor;
      for (std::int64_t column = kHeld * kBlockThreads + threadIdx.x; column < width; column += kBlockThreads) {
        row[column] *= factor;
      }
    }
    place = order ? place + (place + 1 < batch && labels[place + 1] == label ? 1 : batch)
                  : engine::find_label(labels, place + 1, batch, label);
  }
  for (int part = 0; part < kHeld; ++part) {
    const std::int64_t column = part * kBlockThreads + threadIdx.x;
    if (column < width) row[column] = held[part];
  }
}

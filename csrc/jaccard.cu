// The k-reciprocal Jaccard distance on the GPU, after the search for neighbours. Semantics: engine/ops/jaccard.py.
//
// The expanded sets, the averaged weights and the overlaps of their rows are one operation three times: sorted lists of
// nodes with values, of which the values of the same node are added up (merge, below). A block has a row, `count` are
// all rows, and the results come out in ascending order.
#include "block.h"
#include "neighbors.h"
#include "sets.h"
#include "storage.h"

namespace {

using engine::kWarpThreads;
using engine::kWholeWarp;
using engine::Node;

constexpr Node kNoNode = 0x7fffffff;
constexpr int kThreads = 128;  // of a block, but where a block is a warp
constexpr int kBits = 32;      // of a thread's word of marks: a window has up to kThreads * kBits nodes
constexpr int kReaders = 8;    // threads that read a list together
constexpr int kGroups = kThreads / kReaders;

template <typename Value>
__device__ Value lower(Value one, Value other) {
  return other < one ? other : one;
}

// Sorts a list by node, its values, if it has some, with it. All threads must call it.
__device__ void sort(Node* nodes, std::int64_t* values, std::int64_t count) {
  engine::merge_exchange(count, [=](std::int64_t part, std::int64_t first, std::int64_t distance) {
    for (std::int64_t one = threadIdx.x; one + distance < count; one += blockDim.x) {
      const std::int64_t other = one + distance;
      if ((one & part) != first || nodes[one] <= nodes[other]) continue;
      const Node node = nodes[one];
      nodes[one] = nodes[other];
      nodes[other] = node;
      if (values == nullptr) continue;
      const std::int64_t value = values[one];
      values[one] = values[other];
      values[other] = value;
    }
    __syncthreads();
  });
}

// The sum over the threads before this one; `total` becomes that over all. All threads must call it.
__device__ int sum_before(int value, int& total) {
  constexpr int kWarps = kThreads / kWarpThreads;
  __shared__ int parts[kWarps];
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  int sum = value;
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const int other = __shfl_up_sync(kWholeWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarpThreads - 1) parts[warp] = sum;
  __syncthreads();
  sum -= value;
  total = 0;
  for (int part = 0; part < kWarps; ++part) {
    if (part < warp) sum += parts[part];
    total += parts[part];
  }
  return sum;
}

// Nodes, ascending, and what each brings: its value, but at most `most`, or `most` itself where there are no values.
struct List {
  const Node* nodes;
  const std::int64_t* values;
  std::int64_t length, most;
};

// Adds up by node what the lists row.list(0), ... bring, and hands out each node with its sum by
// row.write(place, node, sum), nodes ascending, if row.keep(node, sum). Returns how many it kept. Sums are of integers
// above 0, the same in any order.
//
// The sums of `window` consecutive nodes at a time lie in dynamic shared memory. `cursors`, one for each list, tell how
// far the lists were read; the next window begins at the lowest node that is left in one.
template <typename Row>
__device__ Node merge(const Row& row, std::int64_t list_count, Node* cursors, std::int64_t window) {
  extern __shared__ std::int64_t sums[];
  __shared__ unsigned marks[kThreads];  // of the nodes that have a sum
  __shared__ Node next;
  const int reader = threadIdx.x % kReaders, group = threadIdx.x / kReaders;
  for (std::int64_t place = threadIdx.x; place < window; place += kThreads) sums[place] = 0;
  marks[threadIdx.x] = 0;
  if (threadIdx.x == 0) next = kNoNode;
  __syncthreads();

  Node written = 0;
  for (Node base = 0; base != kNoNode;) {
    const std::int64_t end = base + window;
    Node ahead = kNoNode;
    for (std::int64_t first = 0; first < list_count; first += kGroups) {  // as often in every lane
      const std::int64_t place = first + group;
      Node entry = 0;
      if (place < list_count) {
        const List list = row.list(place);
        for (entry = (base == 0 ? 0 : cursors[place]) + reader; entry < list.length; entry += kReaders) {
          const Node node = list.nodes[entry];
          if (node >= end) {
            ahead = lower(ahead, node);
            break;
          }
          const std::int64_t value = list.values == nullptr ? list.most : lower(list.values[entry], list.most);
          if (value <= 0) continue;
          using Word = unsigned long long;
          const Word before = atomicAdd(reinterpret_cast<Word*>(sums + (node - base)), static_cast<Word>(value));
          if (before == 0) atomicOr(marks + (node - base) / kBits, 1u << (node - base) % kBits);
        }
      }
      // Each reader stopped at an entry of its own; the lowest is the first that is beyond the window.
      for (int lanes = kReaders / 2; lanes > 0; lanes /= 2) {
        entry = lower(entry, __shfl_xor_sync(kWholeWarp, entry, lanes));
      }
      if (place < list_count && reader == 0) cursors[place] = entry;
    }
    if (ahead != kNoNode) atomicMin(&next, ahead);
    __syncthreads();

    const Node here = kBits * static_cast<Node>(threadIdx.x), own = base + here;  // first of this thread's nodes
    const unsigned marked = marks[threadIdx.x];
    unsigned kept = 0;
    for (unsigned left = marked; left != 0; left &= left - 1) {
      const int bit = __ffs(left) - 1;
      if (row.keep(own + bit, sums[here + bit])) kept |= 1u << bit;
    }
    base = next;
    int total;
    Node place = written + sum_before(__popc(kept), total);
    written += total;
    for (unsigned left = marked; left != 0; left &= left - 1) {
      const int bit = __ffs(left) - 1;
      if (kept >> bit & 1) row.write(place++, own + bit, sums[here + bit]);
      sums[here + bit] = 0;
    }
    marks[threadIdx.x] = 0;
    if (threadIdx.x == 0) next = kNoNode;
    __syncthreads();
  }
  return written;
}

// R*: R(row, k1) and those R(j, half) that expand it.
struct Members {
  const Node *near, *halves, *lengths;
  std::int64_t near_size, half;
  Node* members;

  __device__ List list(std::int64_t place) const {
    if (place == near_size) return {near, nullptr, near_size, 1};
    return {halves + near[place] * half, nullptr, lengths[place], 1};
  }
  __device__ bool keep(Node, std::int64_t) const { return true; }
  __device__ void write(Node place, Node node, std::int64_t) const {
    if (members != nullptr) members[place] = node;
  }
};

// The sum of the weights of a row's neighbours.
struct Expanded {
  const std::int64_t* neighbors;
  std::int64_t count;
  const std::int64_t* starts;
  const Node* members;
  const std::int64_t* weights;
  Node* columns;
  std::int64_t* values;

  __device__ List list(std::int64_t place) const {
    const std::int64_t node = neighbors[place];
    if (node < 0 || node >= count) return {nullptr, nullptr, 0, 0};
    return {members + starts[node], weights + starts[node], starts[node + 1] - starts[node], engine::kOne};
  }
  __device__ bool keep(Node, std::int64_t) const { return true; }
  __device__ void write(Node place, Node node, std::int64_t sum) const {
    columns[place] = node;
    values[place] = sum;
  }
};

// The distances below 1 from one row.
struct Distances {
  const Node* own;  // the row
  const Node* columns;
  const std::int64_t* values;
  std::int64_t size;
  const std::int64_t* turned_starts;
  const Node* turned_rows;
  const std::int64_t* turned_values;
  std::int64_t full;
  std::int64_t* neighbors;
  float* distances;

  __device__ List list(std::int64_t place) const {
    if (place == size) return {own, nullptr, 1, full};  // it shares all with itself, were it without a neighbour
    const std::int64_t start = turned_starts[columns[place]], end = turned_starts[columns[place] + 1];
    return {turned_rows + start, turned_values + start, end - start, values[place]};
  }
  __device__ float distance(Node node, std::int64_t sum) const {
    return node == *own ? 0.0f : engine::jaccard_distance<float>(sum, full);
  }
  __device__ bool keep(Node node, std::int64_t sum) const { return distance(node, sum) < 1; }
  __device__ void write(Node place, Node node, std::int64_t sum) const {
    if (neighbors == nullptr) return;
    neighbors[place] = node;
    distances[place] = distance(node, sum);
  }
};

// The softmax of the negative squared distances over R*.
template <typename Stored>
__device__ void weigh(const Stored* features, std::int64_t width, const std::int64_t* starts, const Node* members,
                      double* shares, std::int64_t* weights) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const std::int64_t begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
  const Stored* const own = features + blockIdx.x * width;
  for (std::int64_t entry = begin + warp; entry < end; entry += kThreads / kWarpThreads) {
    const Stored* const other = features + members[entry] * width;
    float squared = 0;
    for (std::int64_t column = lane; column < width; column += kWarpThreads) {
      const float difference = static_cast<float>(own[column]) - static_cast<float>(other[column]);
      squared += difference * difference;
    }
    squared = engine::warp_sum(squared);
    if (lane == 0) shares[entry] = exp(-static_cast<double>(squared));
  }
  __syncthreads();
  double total = 0;
  for (std::int64_t entry = begin; entry < end; ++entry) total += shares[entry];
  for (std::int64_t entry = begin + threadIdx.x; entry < end; entry += kThreads) {
    weights[entry] = engine::to_fixed(shares[entry] / total);
  }
}

}  // namespace

// R(., k), ascending: sets [count, k], sizes [count]. neighbors [count, k1], the nearest first; an index outside
// [0, count) is skipped. A block is a warp.
extern "C" __global__ void jaccard_reciprocal_kernel(const std::int64_t* neighbors, std::int64_t count, std::int64_t k1,
                                                     std::int64_t k, Node* sets, Node* sizes) {
  const std::int64_t row = blockIdx.x;
  Node* const set = sets + row * k;
  Node size = 0;
  for (std::int64_t first = 0; first < k; first += kWarpThreads) {
    const std::int64_t place = first + threadIdx.x, other = place < k ? neighbors[row * k1 + place] : -1;
    const bool mutual =
        other >= 0 && other < count && engine::position(neighbors + other * k1, static_cast<Node>(k), row) < k;
    const unsigned lanes = __ballot_sync(kWholeWarp, mutual);
    if (mutual) set[size + __popc(lanes & ((1u << threadIdx.x) - 1))] = static_cast<Node>(other);
    size += __popc(lanes);
  }
  __syncthreads();
  sort(set, nullptr, size);
  if (threadIdx.x == 0) sizes[row] = size;
}

// Of every R(j, half), j in R(row, k1), how many of it expand R(row, k1): all or none. near [count, k1] and
// halves [count, half] with their sizes [count] in, lengths [count, k1] out.
extern "C" __global__ void jaccard_accept_kernel(const Node* near, const Node* near_sizes, std::int64_t k1,
                                                 const Node* halves, const Node* half_sizes, std::int64_t half,
                                                 Node* lengths) {
  const std::int64_t row = blockIdx.x;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const Node* const set = near + row * k1;
  const Node size = near_sizes[row];
  for (Node place = warp; place < size; place += kThreads / kWarpThreads) {
    const Node *const candidates = halves + set[place] * half, length = half_sizes[set[place]];
    Node shared = 0;
    for (Node first = 0; first < length; first += kWarpThreads) {
      const Node entry = first + lane;
      const bool inside = entry < length && engine::contains(set, size, candidates[entry]);
      shared += __popc(__ballot_sync(kWholeWarp, inside));
    }
    if (lane == 0) lengths[row * k1 + place] = engine::expands(shared, length) ? length : 0;
  }
}

// R*, ascending. sizes [count] out; where `members` is not null, row i of it begins at starts[i].
extern "C" __global__ void jaccard_members_kernel(const Node* near, const Node* near_sizes, std::int64_t k1,
                                                  const Node* halves, std::int64_t half, const Node* lengths,
                                                  Node* cursors, const std::int64_t* starts, Node* members, Node* sizes,
                                                  std::int64_t window) {
  const std::int64_t row = blockIdx.x;
  const Members set{near + row * k1, halves, lengths + row * k1,
                    near_sizes[row], half,   members == nullptr ? nullptr : members + starts[row]};
  const Node size = merge(set, set.near_size + 1, cursors + row * (k1 + 1), window);
  if (threadIdx.x == 0) sizes[row] = size;
}

// jaccard_weights_<type>_kernel: features [count, width], R* as CSR; weights, in fixed point, of its entries out.
// `shares` has room for as many.
#define ENGINE_WEIGHTS(name, Stored)                                                                          \
  extern "C" __global__ void jaccard_weights_##name##_kernel(const Stored* features, std::int64_t width,      \
                                                             const std::int64_t* starts, const Node* members, \
                                                             double* shares, std::int64_t* weights) {         \
    weigh(features, width, starts, members, shares, weights);                                                 \
  }
ENGINE_EVERY_STORAGE(ENGINE_WEIGHTS)

// The sums of the weights (CSR) of each row's first k2 neighbours. Row i of columns and values begins at bounds[i];
// sizes [count] out.
extern "C" __global__ void jaccard_expand_kernel(const std::int64_t* neighbors, std::int64_t count, std::int64_t k1,
                                                 std::int64_t k2, const std::int64_t* starts, const Node* members,
                                                 const std::int64_t* weights, Node* cursors, const std::int64_t* bounds,
                                                 Node* columns, std::int64_t* values, Node* sizes,
                                                 std::int64_t window) {
  const std::int64_t row = blockIdx.x;
  const Expanded sum{neighbors + row * k1, count, starts, members, weights, columns + bounds[row],
                     values + bounds[row]};
  const Node size = merge(sum, k2, cursors + row * k2, window);
  if (threadIdx.x == 0) sizes[row] = size;
}

// column_counts [count] grow by the entries of each column.
extern "C" __global__ void jaccard_count_kernel(const std::int64_t* bounds, const Node* sizes, const Node* columns,
                                                Node* column_counts) {
  const Node* const row = columns + bounds[blockIdx.x];
  for (Node place = threadIdx.x; place < sizes[blockIdx.x]; place += kThreads) atomicAdd(column_counts + row[place], 1);
}

// Puts every entry into the list of its column, in any order. column_counts go down to 0.
extern "C" __global__ void jaccard_turn_kernel(const std::int64_t* bounds, const Node* sizes, const Node* columns,
                                               const std::int64_t* values, const std::int64_t* turned_starts,
                                               Node* column_counts, Node* turned_rows, std::int64_t* turned_values) {
  const std::int64_t row = blockIdx.x;
  for (Node place = threadIdx.x; place < sizes[row]; place += kThreads) {
    const std::int64_t entry = bounds[row] + place;
    const Node column = columns[entry];
    const std::int64_t target = turned_starts[column] + atomicAdd(column_counts + column, -1) - 1;
    turned_rows[target] = static_cast<Node>(row);
    turned_values[target] = values[entry];
  }
}

// Sorts the list of every column.
extern "C" __global__ void jaccard_sort_kernel(const std::int64_t* turned_starts, Node* turned_rows,
                                               std::int64_t* turned_values) {
  const std::int64_t start = turned_starts[blockIdx.x];
  sort(turned_rows + start, turned_values + start, turned_starts[blockIdx.x + 1] - start);
}

// The distances below 1 of the rows of weights, of which `full` is the sum of each. sizes [count] out; where
// `neighbors` is not null, row i of it and of `distances` begins at starts[i].
extern "C" __global__ void jaccard_distance_kernel(const std::int64_t* bounds, const Node* weight_sizes,
                                                   const Node* columns, const std::int64_t* values,
                                                   const std::int64_t* turned_starts, const Node* turned_rows,
                                                   const std::int64_t* turned_values, std::int64_t full, Node* cursors,
                                                   const std::int64_t* starts, std::int64_t* neighbors,
                                                   float* distances, Node* sizes, std::int64_t window) {
  const std::int64_t row = blockIdx.x, bound = bounds[row], start = neighbors == nullptr ? 0 : starts[row];
  __shared__ Node own;
  if (threadIdx.x == 0) own = static_cast<Node>(row);  // merge begins with a barrier
  const Distances distance{&own,
                           columns + bound,
                           values + bound,
                           weight_sizes[row],
                           turned_starts,
                           turned_rows,
                           turned_values,
                           full,
                           neighbors == nullptr ? nullptr : neighbors + start,
                           neighbors == nullptr ? nullptr : distances + start};
  const Node size = merge(distance, distance.size + 1, cursors + bound + row, window);
  if (threadIdx.x == 0) sizes[row] = size;
}

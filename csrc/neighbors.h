// k-reciprocal encoding, as far as it concerns one list, one set or one pair: the rules of jaccard on any device.
#pragma once

#include "host_device.h"

namespace engine {

// A row's index. More rows than this counts would have more pairs than anyone can compare.
using Node = std::int32_t;

// Weight 1 in fixed point. Sums of integers are exact: the same bits in any order.
constexpr std::int64_t kOne = std::int64_t{1} << 48;

// Where `node` first stands in a list, `length` when it does not.
template <typename Index>
ENGINE_HOST_DEVICE Node position(const Index* list, Node length, Index node) {
  Node place = 0;
  while (place < length && list[place] != node) ++place;
  return place;
}

// Whether `node` stands in an ascending list.
ENGINE_HOST_DEVICE inline bool contains(const Node* list, Node length, Node node) {
  Node begin = 0;
  for (Node end = length; begin < end;) {
    const Node middle = begin + (end - begin) / 2;
    if (list[middle] < node) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin < length && list[begin] == node;
}

// Whether a set of `size` rows, `shared` of them in R(i, k1), expands it.
ENGINE_HOST_DEVICE inline bool expands(std::int64_t shared, std::int64_t size) { return 3 * shared > 2 * size; }

// A weight of [0, 1] in fixed point; 0 for NaN.
ENGINE_HOST_DEVICE inline std::int64_t to_fixed(double weight) {
  return weight > 0 ? static_cast<std::int64_t>(weight * static_cast<double>(kOne) + 0.5) : 0;
}

// J of two rows of weights that share `shared`; `full` is what one shares with itself.
template <typename Real>
ENGINE_HOST_DEVICE Real jaccard_distance(std::int64_t shared, std::int64_t full) {
  const double share = static_cast<double>(shared) / static_cast<double>(full);
  const double distance = 1 - share / (2 - share);
  return static_cast<Real>(distance > 0 ? distance : 0);
}

}  // namespace engine

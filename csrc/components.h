// Connected components by union and find, each known by its lowest node: the rules of dbscan on any device.
#pragma once

#include "host_device.h"

namespace engine {

// The root of `node`'s tree. Halves the path to it; parents lie below their children, so it ends.
ENGINE_HOST_DEVICE inline std::int64_t find_root(std::int64_t* parents, std::int64_t node) {
  while (parents[node] != node) {
    parents[node] = parents[parents[node]];
    node = parents[node];
  }
  return node;
}

// Joins two trees: the higher root hangs below the lower one.
ENGINE_HOST_DEVICE inline void unite(std::int64_t* parents, std::int64_t one, std::int64_t other) {
  one = find_root(parents, one);
  other = find_root(parents, other);
  if (one < other) {
    parents[other] = one;
  } else {
    parents[one] = other;
  }
}

}  // namespace engine

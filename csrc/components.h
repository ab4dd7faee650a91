// Connected components by union and find, each known by its lowest node: the rules of dbscan on any device.
#pragma once

#include "host_device.h"

namespace engine {

// The root of `node`'s tree. Halves the path to it; parents lie below their children, so it ends. Trees may grow
// meanwhile: what is read late is an ancestor still, and so is what is written.
ENGINE_HOST_DEVICE inline std::int64_t find_root(volatile std::int64_t* parents, std::int64_t node) {
  for (;;) {
    const std::int64_t parent = parents[node];
    if (parent == node) return node;
    const std::int64_t above = parents[parent];
    if (above == parent) return parent;
    parents[node] = above;
    node = above;
  }
}

// Hangs a root below `parent`, unless another thread was first. Returns what was its parent before: itself, if it was a
// root.
ENGINE_HOST_DEVICE inline std::int64_t hang(std::int64_t* parents, std::int64_t root, std::int64_t parent) {
#ifdef __CUDA_ARCH__
  using Word = unsigned long long;
  return static_cast<std::int64_t>(
      atomicCAS(reinterpret_cast<Word*>(parents + root), static_cast<Word>(root), static_cast<Word>(parent)));
#else
  const std::int64_t before = parents[root];
  if (before == root) parents[root] = parent;
  return before;
#endif
}

// Joins two trees: the higher root hangs below the lower one. Threads of a GPU may join at once.
ENGINE_HOST_DEVICE inline void unite(std::int64_t* parents, std::int64_t one, std::int64_t other) {
  one = find_root(parents, one);
  other = find_root(parents, other);
  while (one != other) {
    const std::int64_t higher = one < other ? other : one, lower = one < other ? one : other;
    const std::int64_t parent = hang(parents, higher, lower);
    if (parent == higher) return;
    one = find_root(parents, parent);
    other = lower;
  }
}

}  // namespace engine

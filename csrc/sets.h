// Sets of indices: the rules of the set operators, row by row, on any device.
#pragma once

#include "host_device.h"

namespace engine {

// Rows that are worth a thread, of `entries` each.
ENGINE_HOST_DEVICE inline std::int64_t set_rows_per_block(std::int64_t entries) {
  return 1 + (1 << 12) / (1 + entries);
}

// The steps of a sort by merge exchange (Batcher; Knuth, The Art of Computer Programming 3, algorithm 5.2.2M): in each,
// `step(part, first, distance)` puts in order the entries `place` and `place + distance` of all places with
// (place & part) == first, in any order or at once. Which entries are compared does not hang on what they are.
template <typename Step>
ENGINE_HOST_DEVICE inline void merge_exchange(std::int64_t count, const Step& step) {
  std::int64_t top = 1;
  while (2 * top < count) top *= 2;
  for (std::int64_t part = top; part > 0; part /= 2) {
    std::int64_t first = 0, distance = part;
    for (std::int64_t width = top;; width /= 2) {
      step(part, first, distance);
      if (width == part) break;
      distance = width - part;
      first = part;
    }
  }
}

// Sorts in place. For rows of some dozens nothing is faster, as no branch is guessed wrong.
ENGINE_HOST_DEVICE inline void sort_ascending(std::int64_t* entries, std::int64_t count) {
  merge_exchange(count, [=](std::int64_t part, std::int64_t first, std::int64_t distance) {
    for (std::int64_t begin = first; begin + distance < count; begin += 2 * part) {
      const std::int64_t end = begin + part + distance < count ? begin + part : count - distance;
      for (std::int64_t place = begin; place < end; ++place) {
        const std::int64_t one = entries[place], other = entries[place + distance];
        entries[place] = one < other ? one : other;
        entries[place + distance] = one < other ? other : one;
      }
    }
  });
}

// The set of a padded row: entries of at least 0, ascending, each once. Returns its size; `set` has room for `count`
// entries and may be `row`.
ENGINE_HOST_DEVICE inline std::int64_t make_set(const std::int64_t* row, std::int64_t count, std::int64_t* set) {
  std::int64_t kept = 0;
  for (std::int64_t place = 0; place < count; ++place) {
    set[kept] = row[place];
    kept += row[place] >= 0;
  }
  sort_ascending(set, kept);
  std::int64_t size = 0;
  for (std::int64_t place = 0; place < kept; ++place) {
    set[size] = set[place];
    size += place + 1 == kept || set[place] != set[place + 1];
  }
  return size;
}

// What two sets share. Returns its size; `shared` has room for the smaller of both and may be `one`.
ENGINE_HOST_DEVICE inline std::int64_t intersect(const std::int64_t* one, std::int64_t one_size,
                                                 const std::int64_t* other, std::int64_t other_size,
                                                 std::int64_t* shared) {
  std::int64_t size = 0, first = 0, second = 0;
  while (first < one_size && second < other_size) {
    const std::int64_t left = one[first], right = other[second];
    shared[size] = left;
    size += left == right;
    first += left <= right;
    second += right <= left;
  }
  return size;
}

// Padding from the end of a set to the end of its row.
ENGINE_HOST_DEVICE inline void pad(std::int64_t* row, std::int64_t size, std::int64_t width) {
  for (; size < width; ++size) row[size] = -1;
}

}  // namespace engine

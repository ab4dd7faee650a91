#include "jaccard.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"

namespace engine {
namespace {

// Blocks small enough for their memory to be used again, few enough for scratch of one entry per row of the data.
constexpr std::int64_t kBlocks = 256;
constexpr std::int64_t kLeastRowsPerBlock = 32;

std::int64_t rows_per_block(std::int64_t count) {
  return std::max(kLeastRowsPerBlock, (count + kBlocks - 1) / kBlocks);
}

// The rows that make(begin, end, block) appends, block by block.
template <typename Value, typename MakeRows>
std::vector<Rows<Value>> make_blocks(std::int64_t count, int threads, const MakeRows& make) {
  const std::int64_t grain = rows_per_block(count);
  std::vector<Rows<Value>> blocks(static_cast<std::size_t>((count + grain - 1) / grain));
  parallel_for(count, grain, threads,
               [&](std::int64_t begin, std::int64_t end) { make(begin, end, blocks[begin / grain]); });
  return blocks;
}

// Puts blocks of rows one after the other into CSR arrays.
template <typename Value, typename Index>
void join(const std::vector<Rows<Value>>& blocks, std::int64_t* starts, Index* columns, Value* values, int threads) {
  std::vector<std::int64_t> offsets{0};
  starts[0] = 0;
  for (const Rows<Value>& block : blocks) {
    for (std::size_t row = 1; row < block.starts.size(); ++row) *++starts = offsets.back() + block.starts[row];
    offsets.push_back(offsets.back() + block.starts.back());
  }
  parallel_for(static_cast<std::int64_t>(blocks.size()), 1, threads, [&](std::int64_t index, std::int64_t) {
    const Rows<Value>& block = blocks[index];
    std::copy(block.columns.begin(), block.columns.end(), columns + offsets[index]);
    std::copy(block.values.begin(), block.values.end(), values + offsets[index]);
  });
}

template <typename Value>
Rows<Value> joined(const std::vector<Rows<Value>>& blocks, int threads) {
  std::size_t row_count = 0, entry_count = 0;
  for (const Rows<Value>& block : blocks) {
    row_count += block.starts.size() - 1;
    entry_count += block.columns.size();
  }
  Rows<Value> rows;
  rows.starts.resize(row_count + 1);
  rows.columns.resize(entry_count);
  rows.values.resize(entry_count);
  join(blocks, rows.starts.data(), rows.columns.data(), rows.values.data(), threads);
  return rows;
}

int lowest_bit(std::uint64_t word) {
#ifdef __GNUC__
  return __builtin_ctzll(word);
#else
  int bit = 0;
  while (!(word >> bit & 1)) ++bit;
  return bit;
#endif
}

// A set of columns that gives them back in ascending order: one bit for each, and one for each word of these.
class ColumnSet {
 public:
  explicit ColumnSet(std::int64_t count)
      : words_(static_cast<std::size_t>(count / 64 + 1)), summary_(words_.size() / 64 + 1) {}

  void insert(Node column) {
    words_[column >> 6] |= std::uint64_t{1} << (column & 63);
    summary_[column >> 12] |= std::uint64_t{1} << (column >> 6 & 63);
  }

  // Calls visit(column) for each and forgets them.
  template <typename Visit>
  void drain(const Visit& visit) {
    for (std::size_t group = 0; group < summary_.size(); ++group) {
      for (; summary_[group]; summary_[group] &= summary_[group] - 1) {
        const std::size_t place = group * 64 + lowest_bit(summary_[group]);
        for (std::uint64_t& word = words_[place]; word; word &= word - 1) {
          visit(static_cast<Node>(place * 64 + lowest_bit(word)));
        }
      }
    }
  }

 private:
  std::vector<std::uint64_t> words_, summary_;
};

// Sums by column, of which a row touches few. Only positive values may be added.
class Sums {
 public:
  explicit Sums(std::int64_t count)
      : sums_(static_cast<std::size_t>(count)), touched_(static_cast<std::size_t>(count + 1)), columns_(count) {}

  void add(Node column, std::int64_t value) {
    touched_[touched_count_] = column;  // stays there when it is the first of this column
    touched_count_ += sums_[column] == 0;
    sums_[column] += value;
  }

  // Calls visit(column, sum) for all that were touched, columns ascending, and forgets them.
  template <typename Visit>
  void drain(const Visit& visit) {
    for (std::size_t place = 0; place < touched_count_; ++place) columns_.insert(touched_[place]);
    touched_count_ = 0;
    columns_.drain([&](Node column) {
      visit(column, sums_[column]);
      sums_[column] = 0;
    });
  }

 private:
  std::vector<std::int64_t> sums_;
  std::vector<Node> touched_;
  std::size_t touched_count_ = 0;
  ColumnSet columns_;
};

// R(., k1) and R(., half): the latter is the first part of the former.
struct Reciprocal {
  std::int64_t k1;
  std::vector<Node> nodes;  // [count, k1]
  std::vector<Node> near_counts, half_counts;

  const Node* row(std::int64_t i) const { return nodes.data() + i * k1; }
};

// The neighbours with -1 in place of what is no row.
std::vector<Node> checked(const std::int64_t* neighbors, std::int64_t count, std::int64_t k1) {
  std::vector<Node> nodes(static_cast<std::size_t>(count * k1));
  std::transform(neighbors, neighbors + count * k1, nodes.begin(), [=](std::int64_t neighbor) {
    return neighbor >= 0 && neighbor < count ? static_cast<Node>(neighbor) : Node{-1};
  });
  return nodes;
}

Reciprocal reciprocal(const std::vector<Node>& neighbors, std::int64_t count, std::int64_t k1, std::int64_t half,
                      int threads) {
  const auto rows = static_cast<std::size_t>(count);
  Reciprocal sets{k1, std::vector<Node>(neighbors.size()), std::vector<Node>(rows), std::vector<Node>(rows)};
  parallel_for(count, rows_per_block(count), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      Node* const members = sets.nodes.data() + i * k1;
      Node near_count = 0, half_count = 0;
      for (std::int64_t place = 0; place < k1; ++place) {
        const Node other = neighbors[i * k1 + place];
        if (other < 0) continue;
        const Node back = position(neighbors.data() + other * k1, static_cast<Node>(k1), static_cast<Node>(i));
        if (back == k1) continue;
        members[near_count++] = other;
        if (place < half && back < half) std::swap(members[half_count++], members[near_count - 1]);
      }
      sets.near_counts[i] = near_count;
      sets.half_counts[i] = half_count;
    }
  });
  return sets;
}

// R*, row by row.
class Expansion {
 public:
  explicit Expansion(std::int64_t count) : marks_(static_cast<std::size_t>(count), kUnmarked) {}

  // The members of R*(i), valid until the next call. No row is asked for twice.
  const std::vector<Node>& of(std::int64_t i, const Reciprocal& sets) {
    const Node near = static_cast<Node>(i), added = ~near;
    members_.assign(sets.row(i), sets.row(i) + sets.near_counts[i]);
    for (const Node member : members_) marks_[member] = near;
    for (Node place = 0; place < sets.near_counts[i]; ++place) {
      const Node* const half = sets.row(members_[place]);
      const Node* const half_end = half + sets.half_counts[members_[place]];
      const auto shared = std::count_if(half, half_end, [&](Node node) { return marks_[node] == near; });
      if (!expands(shared, half_end - half)) continue;
      for (const Node* node = half; node < half_end; ++node) {
        if (marks_[*node] == near || marks_[*node] == added) continue;
        marks_[*node] = added;
        members_.push_back(*node);
      }
    }
    return members_;
  }

 private:
  static constexpr Node kUnmarked = std::numeric_limits<Node>::max();

  std::vector<Node> marks_;  // of what is in R(i, k1): i; of what the expansion added: ~i
  std::vector<Node> members_;
};

// Independent partial sums, as many as keep the vector units busy: the compiler may not reorder one sum.
constexpr std::int64_t kLanes = 32;

template <typename Real>
#ifdef __GNUC__
__attribute__((always_inline))
#endif
inline Real sum_of_squares(const Real* one, const Real* other, std::int64_t width) {
  Real lanes[kLanes] = {};
  std::int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const Real difference = one[column + lane] - other[column + lane];
      lanes[lane] += difference * difference;
    }
  }
  for (std::int64_t lane = 0; column < width; ++column, ++lane) {
    const Real difference = one[column] - other[column];
    lanes[lane] += difference * difference;
  }
  Real sum = 0;
  for (const Real lane : lanes) sum += lane;
  return sum;
}

template <typename Real>
using SquaredDistance = Real (*)(const Real* one, const Real* other, std::int64_t width);

template <typename Real>
Real squared_distance(const Real* one, const Real* other, std::int64_t width) {
  return sum_of_squares(one, other, width);
}

#ifdef ENGINE_X86
template <typename Real>
ENGINE_AVX2 Real squared_distance_avx2(const Real* one, const Real* other, std::int64_t width) {
  return sum_of_squares(one, other, width);
}

template <typename Real>
ENGINE_AVX512 Real squared_distance_avx512(const Real* one, const Real* other, std::int64_t width) {
  return sum_of_squares(one, other, width);
}
#endif

template <typename Real>
SquaredDistance<Real> pick_squared_distance() {
#ifdef ENGINE_X86
  switch (isa()) {
    case Isa::avx512:
      return squared_distance_avx512<Real>;
    case Isa::avx2:
      return squared_distance_avx2<Real>;
    case Isa::portable:
      break;
  }
#endif
  return squared_distance<Real>;
}

using Weights = Rows<std::int64_t>;  // in fixed point

// The softmax of the negative squared distances over R*.
template <typename Real>
Weights make_weights(const Real* features, const Reciprocal& sets, std::int64_t count, std::int64_t width,
                     int threads) {
  const SquaredDistance<Real> distance = pick_squared_distance<Real>();
  const auto make = [&](std::int64_t begin, std::int64_t end, Weights& block) {
    Expansion expansion(count);
    std::vector<double> shares;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::vector<Node>& members = expansion.of(i, sets);
      shares.clear();
      double total = 0;
      for (const Node member : members) {
        const Real squared = distance(features + i * width, features + member * width, width);
        shares.push_back(std::exp(-static_cast<double>(squared)));
        total += shares.back();
      }
      for (std::size_t place = 0; place < members.size(); ++place) {
        const std::int64_t weight = to_fixed(shares[place] / total);
        if (weight > 0) block.append(members[place], weight);
      }
      block.end_row();
    }
  };
  return joined(make_blocks<std::int64_t>(count, threads, make), threads);
}

// The sum of the weights of each row's first k2 neighbours: k2 times their mean.
Weights expand_queries(const Weights& weights, const std::vector<Node>& neighbors, std::int64_t count, std::int64_t k1,
                       std::int64_t k2, int threads) {
  const auto make = [&](std::int64_t begin, std::int64_t end, Weights& block) {
    Sums sums(count);
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t place = 0; place < k2; ++place) {
        const Node neighbor = neighbors[i * k1 + place];
        if (neighbor < 0) continue;
        for (std::int64_t entry = weights.starts[neighbor]; entry < weights.starts[neighbor + 1]; ++entry) {
          sums.add(weights.columns[entry], weights.values[entry]);
        }
      }
      sums.drain([&](Node column, std::int64_t sum) { block.append(column, sum); });
      block.end_row();
    }
  };
  return joined(make_blocks<std::int64_t>(count, threads, make), threads);
}

// The transposed matrix.
Weights transpose(const Weights& rows, std::int64_t count) {
  Weights turned;
  turned.starts.assign(static_cast<std::size_t>(count + 1), 0);
  turned.columns.resize(rows.columns.size());
  turned.values.resize(rows.values.size());
  for (const Node column : rows.columns) ++turned.starts[column + 1];
  for (std::int64_t row = 0; row < count; ++row) turned.starts[row + 1] += turned.starts[row];
  std::vector<std::int64_t> next(turned.starts.begin(), turned.starts.end() - 1);
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t entry = rows.starts[row]; entry < rows.starts[row + 1]; ++entry) {
      const std::int64_t target = next[rows.columns[entry]]++;
      turned.columns[target] = static_cast<Node>(row);
      turned.values[target] = rows.values[entry];
    }
  }
  return turned;
}

// The distances below 1.
template <typename Real>
std::vector<Rows<Real>> make_distances(const Weights& weights, std::int64_t count, std::int64_t full, int threads) {
  const Weights turned = transpose(weights, count);
  return make_blocks<Real>(count, threads, [&](std::int64_t begin, std::int64_t end, Rows<Real>& block) {
    Sums shared(count);
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t entry = weights.starts[i]; entry < weights.starts[i + 1]; ++entry) {
        const Node column = weights.columns[entry];
        const std::int64_t weight = weights.values[entry];
        for (std::int64_t other = turned.starts[column]; other < turned.starts[column + 1]; ++other) {
          shared.add(turned.columns[other], std::min(weight, turned.values[other]));
        }
      }
      shared.add(static_cast<Node>(i), full);  // a row shares all with itself, were it without a neighbour
      shared.drain([&](Node other, std::int64_t sum) {
        const Real distance = other == i ? Real(0) : jaccard_distance<Real>(sum, full);
        if (distance < 1) block.append(other, distance);
      });
      block.end_row();
    }
  });
}

}  // namespace

template <typename Real>
Jaccard<Real>::Jaccard(const Real* features, const std::int64_t* neighbors, std::int64_t count, std::int64_t width,
                       std::int64_t k1, std::int64_t half, std::int64_t k2, int threads) {
  if (count > std::numeric_limits<Node>::max()) throw std::length_error("jaccard: more rows than 2^31 - 1");
  const std::vector<Node> nodes = checked(neighbors, count, k1);
  Weights weights = make_weights(features, reciprocal(nodes, count, k1, half, threads), count, width, threads);
  weights = expand_queries(weights, nodes, count, k1, k2, threads);
  blocks_ = make_distances<Real>(weights, count, k2 * kOne, threads);
}

template <typename Real>
std::int64_t Jaccard<Real>::entry_count() const {
  std::int64_t total = 0;
  for (const Rows<Real>& block : blocks_) total += block.starts.back();
  return total;
}

template <typename Real>
void Jaccard<Real>::write(std::int64_t* starts, std::int64_t* columns, Real* values, int threads) const {
  join(blocks_, starts, columns, values, threads);
}

template class Jaccard<float>;
template class Jaccard<double>;

}  // namespace engine

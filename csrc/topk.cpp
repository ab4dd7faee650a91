#include "topk.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "matmul.h"
#include "parallel.h"

namespace engine {
namespace {

constexpr std::int64_t kRows = BlockSize::kRows;
constexpr std::int64_t kStripe = BlockSize::kColumns;

// Rows of queries that meet one packed stripe of the bank before another thread may take over.
constexpr std::int64_t kRowsPerTask = 4 * kStripe;

// Entries compared at a time, before it is looked which of them are to be kept.
constexpr std::int64_t kLanes = 16;

constexpr std::int64_t count_blocks(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// The k best candidates of every query so far, and some that may be among them.
//
// A candidate below the k-th best of those seen is dropped at once. The others are appended, and when a query's list is
// full its better half is kept. What is left at the end is exact, by (value descending, index ascending), in whatever
// order candidates came.
template <typename Real>
class Nearest {
 public:
  Nearest(std::int64_t query_count, std::int64_t bank_count, std::int64_t k)
      : k_(std::min(k, bank_count)),
        capacity_(std::min(std::max(2 * k_, kLanes), bank_count)),
        candidates_(query_count * capacity_),
        sizes_(query_count),
        thresholds_(query_count, -std::numeric_limits<Real>::infinity()) {}

  // Offers values[j] as the similarity of `query` with row first + j of the bank, for j in [begin, end).
  void offer_row(std::int64_t query, std::int64_t first, const Real* values, std::int64_t begin, std::int64_t end) {
    const Real* threshold = &thresholds_[query];
    scan(
        values, begin, end, [=](std::int64_t) { return *threshold; },
        [=](std::int64_t j) { offer(query, first + j, values[j]); });
  }

  // Offers values[j] as the similarity of query first + j with row `index` of the bank, for j in [begin, end).
  void offer_column(std::int64_t index, std::int64_t first, const Real* values, std::int64_t begin, std::int64_t end) {
    const Real* thresholds = thresholds_.data() + first;
    scan(
        values, begin, end, [=](std::int64_t j) { return thresholds[j]; },
        [=](std::int64_t j) { offer(first + j, index, values[j]); });
  }

  // The k best of a query in order, padded with -inf and -1. Its list is spent.
  void write(std::int64_t query, std::int64_t k, Real* values, std::int64_t* indices) {
    Candidate* list = candidates_.data() + query * capacity_;
    const std::int64_t found = std::min(k_, sizes_[query]);
    std::partial_sort(list, list + found, list + sizes_[query], better);
    for (std::int64_t place = 0; place < k; ++place) {
      values[place] = place < found ? list[place].value : -std::numeric_limits<Real>::infinity();
      indices[place] = place < found ? list[place].index : -1;
    }
  }

 private:
  struct Candidate {
    Real value;
    std::int64_t index;
  };

  // A function object, not a function: that the algorithms compare inline.
  static constexpr auto better = [](const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  };

  // keep(j) for every j whose value may reach its threshold. Nearly none does: kLanes are looked at together.
  template <typename Threshold, typename Keep>
  static void scan(const Real* values, std::int64_t begin, std::int64_t end, const Threshold& threshold,
                   const Keep& keep) {
    for (; begin + kLanes <= end; begin += kLanes) {
      bool any = false;
      for (std::int64_t j = begin; j < begin + kLanes; ++j) any |= values[j] >= threshold(j);
      if (!any) continue;
      for (std::int64_t j = begin; j < begin + kLanes; ++j) keep(j);
    }
    for (; begin < end; ++begin) keep(begin);
  }

  void offer(std::int64_t query, std::int64_t index, Real value) {
    if (!(value >= thresholds_[query])) return;
    Candidate* list = candidates_.data() + query * capacity_;
    std::int64_t& size = sizes_[query];
    if (size == capacity_) {  // only where k < bank_count, so that k < capacity
      std::nth_element(list, list + k_ - 1, list + size, better);
      thresholds_[query] = list[k_ - 1].value;
      size = k_;
    }
    list[size++] = {value, index};
  }

  std::int64_t k_;
  std::int64_t capacity_;
  std::vector<Candidate> candidates_;  // [query_count, capacity]
  std::vector<std::int64_t> sizes_;
  std::vector<Real> thresholds_;
};

// One search: tasks of up to kRowsPerTask queries and one stripe of the bank, in any order.
template <typename Real>
class Search {
 public:
  Search(const Real* queries, const Real* bank, std::int64_t query_count, std::int64_t bank_count, std::int64_t width,
         std::int64_t k, bool exclude_self)
      : queries_(queries),
        bank_(bank),
        query_count_(query_count),
        bank_count_(bank_count),
        width_(width),
        exclude_self_(exclude_self),
        symmetric_(queries == bank && query_count == bank_count),
        nearest_(query_count, bank_count, k),
        stripe_locks_(count_blocks(query_count, kStripe)) {}

  void run(int threads) {
    const Isa chosen = isa();
    const std::int64_t tasks_per_stripe = count_blocks(query_count_, kRowsPerTask);
    const std::int64_t stripes = count_blocks(bank_count_, kStripe);
    parallel_for(stripes * tasks_per_stripe, 1, threads, [&](std::int64_t task, std::int64_t) {
      search(task / tasks_per_stripe * kStripe, task % tasks_per_stripe * kRowsPerTask, chosen);
    });
  }

  Nearest<Real>& nearest() { return nearest_; }

 private:
  // Queries from first_query on against the stripe of the bank that starts at first_row.
  void search(std::int64_t first_row, std::int64_t first_query, Isa chosen) {
    const std::int64_t rows = std::min(kStripe, bank_count_ - first_row);
    // Of a symmetric search only the pairs query <= row are computed.
    const std::int64_t last_query = std::min(first_query + kRowsPerTask, symmetric_ ? first_row + rows : query_count_);
    if (first_query >= last_query) return;
    BlockProduct<Real> product(chosen, width_);
    product.set_right(bank_ + first_row * width_, rows);
    for (std::int64_t query = first_query; query < last_query; query += kRows) {
      const std::int64_t count = std::min(kRows, last_query - query);
      const std::int64_t first_column = symmetric_ ? std::max<std::int64_t>(query - first_row, 0) : 0;
      const Real* block = product.multiply(queries_ + query * width_, count, first_column);
      offer_rows(block, query, count, first_row, rows);
      if (symmetric_) offer_columns(block, query, count, first_row, rows);
    }
  }

  void offer_rows(const Real* block, std::int64_t first_query, std::int64_t count, std::int64_t first_row,
                  std::int64_t rows) {
    const std::lock_guard<std::mutex> lock(stripe_locks_[first_query / kStripe]);
    for (std::int64_t query = first_query; query < first_query + count; ++query, block += kStripe) {
      const std::int64_t self = query - first_row;
      const std::int64_t before = std::clamp<std::int64_t>(self, 0, rows);
      const std::int64_t after = std::clamp<std::int64_t>(self + exclude_self_, 0, rows);
      if (!symmetric_) nearest_.offer_row(query, first_row, block, 0, before);
      nearest_.offer_row(query, first_row, block, after, rows);
    }
  }

  // The same products, but for those of a row with itself, seen from the rows of the stripe.
  void offer_columns(const Real* block, std::int64_t first_query, std::int64_t count, std::int64_t first_row,
                     std::int64_t rows) {
    const std::lock_guard<std::mutex> lock(stripe_locks_[first_row / kStripe]);
    for (std::int64_t query = first_query; query < first_query + count; ++query, block += kStripe) {
      const std::int64_t after = std::clamp<std::int64_t>(query + 1 - first_row, 0, rows);
      nearest_.offer_column(query, first_row, block, after, rows);
    }
  }

  const Real* queries_;
  const Real* bank_;
  std::int64_t query_count_;
  std::int64_t bank_count_;
  std::int64_t width_;
  bool exclude_self_;
  bool symmetric_;
  Nearest<Real> nearest_;
  std::vector<std::mutex> stripe_locks_;  // one per kStripe queries, held while candidates are offered to them
};

}  // namespace

template <typename Real>
void topk(const Real* queries, const Real* bank, std::int64_t query_count, std::int64_t bank_count, std::int64_t width,
          std::int64_t k, bool exclude_self, Real* values, std::int64_t* indices, int threads) {
  if (k == 0) return;
  Search<Real> search(queries, bank, query_count, bank_count, width, k, exclude_self);
  search.run(threads);
  parallel_for(query_count, kRowsPerTask, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t query = begin; query < end; ++query) {
      search.nearest().write(query, k, values + query * k, indices + query * k);
    }
  });
}

template void topk(const float*, const float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, float*,
                   std::int64_t*, int);
template void topk(const double*, const double*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, double*,
                   std::int64_t*, int);

}  // namespace engine

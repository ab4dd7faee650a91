// The search for the largest products of rows with rows: every product while it is in cache, none stored for good.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "isa.h"
#include "matmul.h"
#include "parallel.h"
#include "rows.h"
#include "vectors.h"

namespace engine {

// The k best candidates of every query so far, and some that may be among them.
//
// A candidate below the k-th best of those seen is dropped at once. The others are appended, and when a query's list is
// full its better half is kept. What is left at the end is exact, by (value descending, index ascending), in whatever
// order candidates came.
template <typename Real>
class Nearest {
 public:
  struct Candidate {
    Real value;
    std::int64_t index;
  };

  // Queries that share a lock.
  static constexpr std::int64_t kQueriesPerLock = BlockSize::kColumns;

  // What is below `least` is no candidate, nor is NaN then; where all are, NaN counts as the largest. k > 0.
  Nearest(std::int64_t query_count, std::int64_t bank_count, std::int64_t k,
          Real least = -std::numeric_limits<Real>::infinity())
      : k_(std::min(k, bank_count)),
        capacity_(std::min(std::max(2 * k_, kLanes), bank_count)),
        candidates_(query_count * capacity_),
        sizes_(query_count),
        keeps_nan_(least == -std::numeric_limits<Real>::infinity()),
        thresholds_(query_count, least),
        locks_((query_count + kQueriesPerLock - 1) / kQueriesPerLock) {}

  // To be held while anything is offered to `query`.
  std::mutex& lock_of(std::int64_t query) { return locks_[query / kQueriesPerLock]; }

  // Offers values[j] as the similarity of `query` with row first + j of the bank, for j in [begin, end).
  void offer_row(std::int64_t query, std::int64_t first, const Real* values, std::int64_t begin, std::int64_t end) {
    const Real* threshold = &thresholds_[query];
    scan(
        values, begin, end, [=](std::int64_t) { return *threshold - Vector{}; },
        [=](std::int64_t j) { offer(query, first + j, values[j]); });
  }

  // Offers values[j] as the similarity of query first + j with row `index` of the bank, for j in [begin, end).
  void offer_column(std::int64_t index, std::int64_t first, const Real* values, std::int64_t begin, std::int64_t end) {
    const Real* thresholds = thresholds_.data() + first;
    scan(
        values, begin, end, [=](std::int64_t j) { return load<Vector>(thresholds + j); },
        [=](std::int64_t j) { offer(first + j, index, values[j]); });
  }

  // The k best of a query in order, or as many as there are.
  struct List {
    const Candidate* begin;
    std::int64_t size;
  };
  List sort(std::int64_t query) {
    Candidate* list = candidates_.data() + query * capacity_;
    const std::int64_t found = std::min(k_, sizes_[query]);
    std::partial_sort(list, list + found, list + sizes_[query], better);
    return {list, found};
  }

 private:
  // Entries compared at a time, before it is looked which of them are to be kept.
  static constexpr std::int64_t kLanes = 16;

  // As wide as any x86-64 has: there is little to gain beside the products.
  using Vector = typename VectorOf<Real, 16>::Type;

  // A function object, not a function: that the algorithms compare inline.
  static constexpr auto better = [](const Candidate& a, const Candidate& b) {
    if (a.value > b.value || a.value < b.value) return a.value > b.value;
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    return a_nan != b_nan ? a_nan : a.index < b.index;
  };

  // keep(j) for every j whose value may reach its threshold. Nearly none does: kLanes are looked at together.
  template <typename Thresholds, typename Keep>
  static void scan(const Real* values, std::int64_t begin, std::int64_t end, const Thresholds& thresholds,
                   const Keep& keep) {
    for (; begin + kLanes <= end; begin += kLanes) {
      auto below = Vector{} == Vector{};
      for (std::int64_t j = begin; j < begin + kLanes; j += VectorOf<Real, 16>::kLanes) {
        below &= load<Vector>(values + j) < thresholds(j);  // NaN is not
      }
      std::uint64_t all[2];
      std::memcpy(all, &below, sizeof(all));
      if ((all[0] & all[1]) == ~std::uint64_t{0}) continue;
      for (std::int64_t j = begin; j < begin + kLanes; ++j) keep(j);
    }
    for (; begin < end; ++begin) keep(begin);
  }

  void offer(std::int64_t query, std::int64_t index, Real value) {
    if (value < thresholds_[query] || (value != value && !keeps_nan_)) return;
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
  bool keeps_nan_;
  std::vector<Real> thresholds_;
  std::vector<std::mutex> locks_;
};

// Queries that one task of a search or after it takes.
constexpr std::int64_t kQueriesPerTask = 4 * BlockSize::kColumns;

// Offers the products of all queries with all rows of a bank: to `of_queries`, whose bank that is, and to `of_bank`
// unless it is null, for which the queries are the bank. Where both are the same, queries and bank must be the same
// rows too, and every product is computed once.
template <typename Real>
class Search {
 public:
  Search(const StoredRows<Real>& queries, const StoredRows<Real>& bank, std::int64_t query_count,
         std::int64_t bank_count, bool exclude_self, Nearest<Real>& of_queries, Nearest<Real>* of_bank)
      : queries_(queries),
        bank_(bank),
        query_count_(query_count),
        bank_count_(bank_count),
        exclude_self_(exclude_self),
        symmetric_(&of_queries == of_bank),
        of_queries_(of_queries),
        of_bank_(of_bank) {}

  // The tasks, of up to kQueriesPerTask queries and one stripe of the bank, run in any order. It is such that the whole
  // bank passes by a group of queries before the next group: of rows that are mapped and do not fit in memory, the bank
  // is read once for a group, not all queries for a stripe.
  void run(int threads) {
    const Isa chosen = isa();
    const std::int64_t tasks_per_stripe = (query_count_ + kQueriesPerTask - 1) / kQueriesPerTask;
    const std::int64_t stripes = (bank_count_ + kStripe - 1) / kStripe;
    parallel_for(stripes * tasks_per_stripe, 1, threads, [&](std::int64_t task, std::int64_t) {
      const std::int64_t first = task / (stripes * kTasksPerGroup) * kTasksPerGroup;
      const std::int64_t size = std::min(kTasksPerGroup, tasks_per_stripe - first);
      const std::int64_t place = task - first * stripes;
      search(place / size * kStripe, (first + place % size) * kQueriesPerTask, chosen);
    });
  }

 private:
  static constexpr std::int64_t kRows = BlockSize::kRows;
  static constexpr std::int64_t kStripe = BlockSize::kColumns;
  static constexpr std::int64_t kTasksPerGroup = 16;

  // Queries from first_query on against the stripe of the bank that starts at first_row.
  void search(std::int64_t first_row, std::int64_t first_query, Isa chosen) {
    const std::int64_t rows = std::min(kStripe, bank_count_ - first_row);
    // Of a symmetric search only the pairs query <= row are computed.
    const std::int64_t last_query =
        std::min(first_query + kQueriesPerTask, symmetric_ ? first_row + rows : query_count_);
    if (first_query >= last_query) return;
    BlockProduct<Real> product(chosen, queries_.width());
    product.set_right(bank_, first_row, rows);
    for (std::int64_t query = first_query; query < last_query; query += kRows) {
      const std::int64_t count = std::min(kRows, last_query - query);
      const std::int64_t first_column = symmetric_ ? std::max<std::int64_t>(query - first_row, 0) : 0;
      const Real* block = product.multiply(queries_, query, count, first_column);
      offer_rows(block, query, count, first_row, rows);
      if (of_bank_) offer_columns(block, query, count, first_row, rows);
    }
  }

  void offer_rows(const Real* block, std::int64_t first_query, std::int64_t count, std::int64_t first_row,
                  std::int64_t rows) {
    const std::lock_guard<std::mutex> lock(of_queries_.lock_of(first_query));
    for (std::int64_t query = first_query; query < first_query + count; ++query, block += kStripe) {
      const std::int64_t self = query - first_row;
      const std::int64_t before = std::clamp<std::int64_t>(self, 0, rows);
      const std::int64_t after = std::clamp<std::int64_t>(self + exclude_self_, 0, rows);
      if (!symmetric_) of_queries_.offer_row(query, first_row, block, 0, before);
      of_queries_.offer_row(query, first_row, block, after, rows);
    }
  }

  // The same products seen from the rows of the stripe; of a symmetric search, without those of a row with itself.
  void offer_columns(const Real* block, std::int64_t first_query, std::int64_t count, std::int64_t first_row,
                     std::int64_t rows) {
    const std::lock_guard<std::mutex> lock(of_bank_->lock_of(first_row));
    for (std::int64_t query = first_query; query < first_query + count; ++query, block += kStripe) {
      const std::int64_t after = symmetric_ ? std::clamp<std::int64_t>(query + 1 - first_row, 0, rows) : 0;
      of_bank_->offer_column(query, first_row, block, after, rows);
    }
  }

  // The rows of a block of queries, and those of a stripe, share one lock each.
  static_assert(Nearest<Real>::kQueriesPerLock % kRows == 0 && Nearest<Real>::kQueriesPerLock % kStripe == 0);

  const StoredRows<Real> queries_;
  const StoredRows<Real> bank_;
  std::int64_t query_count_;
  std::int64_t bank_count_;
  bool exclude_self_;
  bool symmetric_;
  Nearest<Real>& of_queries_;
  Nearest<Real>* of_bank_;
};

}  // namespace engine

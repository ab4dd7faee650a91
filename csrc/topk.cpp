#include "topk.h"

#include <limits>

#include "parallel.h"
#include "search.h"

namespace engine {
namespace {

// The best of a query in order, padded with -inf and -1.
template <typename Real>
void write(typename Nearest<Real>::List list, std::int64_t k, Real* values, std::int64_t* indices) {
  for (std::int64_t place = 0; place < k; ++place) {
    values[place] = place < list.size ? list.begin[place].value : -std::numeric_limits<Real>::infinity();
    indices[place] = place < list.size ? list.begin[place].index : -1;
  }
}

}  // namespace

template <typename Real>
void topk(const StoredRows<Real>& queries, const StoredRows<Real>& bank, std::int64_t query_count,
          std::int64_t bank_count, std::int64_t k, bool exclude_self, Real* values, std::int64_t* indices,
          int threads) {
  if (k == 0) return;
  Nearest<Real> nearest(query_count, bank_count, k);
  const bool same = queries == bank && query_count == bank_count;
  Search<Real>(queries, bank, query_count, bank_count, exclude_self, nearest, same ? &nearest : nullptr).run(threads);
  parallel_for(query_count, kQueriesPerTask, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t query = begin; query < end; ++query) {
      write(nearest.sort(query), k, values + query * k, indices + query * k);
    }
  });
}

template void topk(const StoredRows<float>&, const StoredRows<float>&, std::int64_t, std::int64_t, std::int64_t, bool,
                   float*, std::int64_t*, int);
template void topk(const StoredRows<double>&, const StoredRows<double>&, std::int64_t, std::int64_t, std::int64_t, bool,
                   double*, std::int64_t*, int);

}  // namespace engine

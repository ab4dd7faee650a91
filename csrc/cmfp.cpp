#include "cmfp.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "propagate.h"
#include "search.h"

namespace engine {
namespace {

constexpr std::int64_t kRowsPerTask = 16;

// What a row is divided by is no smaller.
constexpr double kLeastNorm = 1e-12;

// As many partial sums as keep the vector units busy: the compiler may not reorder one sum.
constexpr std::int64_t kLanes = 16;

// 1 over the L2 norm. Summed in double: squares may lie beyond the range of float.
template <typename Real>
Real inverse_norm(const Real* row, std::int64_t width) {
  double lanes[kLanes] = {};
  std::int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = row[column + lane];
      lanes[lane] += value * value;
    }
  }
  for (std::int64_t lane = 0; column < width; ++column, ++lane) lanes[lane] += double(row[column]) * row[column];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return static_cast<Real>(1 / std::max(std::sqrt(sum), kLeastNorm));
}

// One modality, its rows L2-normalised as they are read.
template <typename Real>
class UnitRows {
 public:
  UnitRows(const StoredRows<Real>& rows, std::int64_t count, int threads)
      : rows_(rows), scales_(static_cast<std::size_t>(count)) {
    parallel_for(count, kRowsPerTask, threads, [&](std::int64_t begin, std::int64_t end) {
      std::vector<Real> buffer;
      const Real* row = rows_.block(begin, end - begin, buffer);
      for (std::int64_t i = begin; i < end; ++i, row += rows_.width()) scales_[i] = inverse_norm(row, rows_.width());
    });
  }

  std::int64_t count() const { return static_cast<std::int64_t>(scales_.size()); }
  std::int64_t width() const { return rows_.width(); }
  StoredRows<Real> read() const { return rows_.scaled(scales_.data()); }

 private:
  StoredRows<Real> rows_;
  std::vector<Real> scales_;
};

// Adds the mean of each row's neighbours in a bank, weighted by their similarities, to target [rows, width].
template <typename Real>
void add_means(Nearest<Real>& nearest, std::int64_t row_count, std::int64_t k, const UnitRows<Real>& bank, Real* target,
               int threads) {
  const std::int64_t most = std::min(k, bank.count());
  std::vector<std::int64_t> starts(static_cast<std::size_t>(row_count + 1));
  for (std::int64_t row = 0; row <= row_count; ++row) starts[row] = row * most;
  std::vector<std::int64_t> columns(static_cast<std::size_t>(row_count * most), -1);  // -1: nothing stored
  std::vector<Real> weights(columns.size());
  parallel_for(row_count, kQueriesPerTask, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const auto list = nearest.sort(row);
      Real sum = 0;
      for (const auto* near = list.begin; near < list.begin + list.size; ++near) sum += near->value;
      for (std::int64_t place = 0; place < list.size && list.begin[place].value > 0; ++place) {
        columns[starts[row] + place] = list.begin[place].index;
        weights[starts[row] + place] = list.begin[place].value / sum;
      }
    }
  });
  const Graph<Real> graph{starts.data(), columns.data(), weights.data(), row_count, bank.count()};
  propagate(graph, bank.read(), target, threads);
}

// The neighbours of some rows in a bank: every product serves one row.
template <typename Real>
void add_some(const UnitRows<Real>& rows, Run run, const UnitRows<Real>& bank, std::int64_t k, Real* target,
              int threads) {
  Nearest<Real> nearest(run.count, bank.count(), k, Real(0));
  const StoredRows<Real> queries = rows.read().from(run.first);
  Search<Real>(queries, bank.read(), run.count, bank.count(), false, nearest, nullptr).run(threads);
  add_means(nearest, run.count, k, bank, target, threads);
}

// The block of one modality with itself.
template <typename Real>
void add_own(const UnitRows<Real>& rows, std::int64_t k, Real* target, int threads) {
  Nearest<Real> nearest(rows.count(), rows.count(), k, Real(0));
  Search<Real>(rows.read(), rows.read(), rows.count(), rows.count(), false, nearest, &nearest).run(threads);
  add_means(nearest, rows.count(), k, rows, target, threads);
}

// The two blocks between the modalities: every product serves both of its rows.
template <typename Real>
void add_other(const UnitRows<Real>& vis, const UnitRows<Real>& ir, std::int64_t k, Real* new_vis, Real* new_ir,
               int threads) {
  Nearest<Real> of_vis(vis.count(), ir.count(), k, Real(0)), of_ir(ir.count(), vis.count(), k, Real(0));
  Search<Real>(vis.read(), ir.read(), vis.count(), ir.count(), false, of_vis, &of_ir).run(threads);
  add_means(of_vis, vis.count(), k, ir, new_vis, threads);
  add_means(of_ir, ir.count(), k, vis, new_ir, threads);
}

template <typename Real>
void normalize_rows(Real* rows, std::int64_t count, std::int64_t width, int threads) {
  parallel_for(count, kRowsPerTask, threads, [=](std::int64_t begin, std::int64_t end) {
    for (Real* row = rows + begin * width; row < rows + end * width; row += width) {
      const Real scale = inverse_norm(row, width);
      for (std::int64_t column = 0; column < width; ++column) row[column] *= scale;
    }
  });
}

}  // namespace

template <typename Real>
void cmfp(const StoredRows<Real>& vis, const StoredRows<Real>& ir, std::int64_t vis_count, std::int64_t ir_count,
          Run vis_run, Run ir_run, std::int64_t k, bool normalize, Real* new_vis, Real* new_ir, int threads) {
  if (k == 0) return;
  const UnitRows<Real> unit_vis(vis, vis_count, threads), unit_ir(ir, ir_count, threads);
  if (vis_run.count == vis_count && ir_run.count == ir_count) {
    add_own(unit_vis, k, new_vis, threads);
    add_own(unit_ir, k, new_ir, threads);
    add_other(unit_vis, unit_ir, k, new_vis, new_ir, threads);
  } else {
    add_some(unit_vis, vis_run, unit_vis, k, new_vis, threads);
    add_some(unit_vis, vis_run, unit_ir, k, new_vis, threads);
    add_some(unit_ir, ir_run, unit_ir, k, new_ir, threads);
    add_some(unit_ir, ir_run, unit_vis, k, new_ir, threads);
  }
  if (normalize) {
    normalize_rows(new_vis, vis_run.count, vis.width(), threads);
    normalize_rows(new_ir, ir_run.count, ir.width(), threads);
  }
}

template void cmfp(const StoredRows<float>&, const StoredRows<float>&, std::int64_t, std::int64_t, Run, Run,
                   std::int64_t, bool, float*, float*, int);
template void cmfp(const StoredRows<double>&, const StoredRows<double>&, std::int64_t, std::int64_t, Run, Run,
                   std::int64_t, bool, double*, double*, int);

}  // namespace engine

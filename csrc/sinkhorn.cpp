#include "sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vectors.h"

namespace engine {
namespace {

constexpr int kWidestVector = 64;

// Rows whose column sums are added up one after the other. Fixed, so that sums do not depend on the thread count.
constexpr std::int64_t kBlockRows = 128;

// Columns repaired at a time: neighbours share the cache lines of a row.
constexpr std::int64_t kBlockColumns = 64;

// Starting a thread costs about as much as visiting this many entries.
constexpr std::int64_t kEntriesPerThread = 1 << 17;

// A term over the largest of an earlier iteration is at most exp of this, and the sum of a row between these bounds:
// neither overflows, nor does a term that matters underflow.
template <typename Real>
constexpr Real kMostExponent = sizeof(Real) == 4 ? 80 : 700;
template <typename Real>
constexpr Real kLeastSum = Real(1e-6);

template <typename Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <typename Real>
constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

// log(weight / sum), where nothing can be sent 0 instead of weight / 0.
double divide(double log_weight, double log_sum) {
  return log_sum == -kInfinity<double> ? log_sum : log_weight - log_sum;
}

// One problem. With s_ij = (cost_ij - offset_i) / reg, the row step finds log sum_j exp(log_v_j - s_ij) as
// largest_i + log(sum_i); the visit then adds weight_i / sum_i * exp(log_v_j - s_ij - largest_i), which is the plan but
// for the factor `scale`, to the sum of column j: one exponential an entry serves both.
template <typename Real>
struct Problem {
  Problem(const Real* cost, const Real* log_a, const Real* log_b, std::int64_t rows, std::int64_t columns, double reg);

  std::int64_t block_count() const { return (rows + kBlockRows - 1) / kBlockRows; }
  Real scaled(std::int64_t row, std::int64_t column) const {
    return (cost[row * columns + column] - offset[row]) * inverse_reg;
  }
  double log_u(std::int64_t row) const { return divide(log_a[row], largest[row] + std::log(double(sum[row]))); }

  const Real* cost;
  const Real* log_a;
  const Real* log_b;
  std::int64_t rows, columns;
  std::int64_t stride;  // columns rounded up to whole vectors
  Real inverse_reg;
  double log_scale;              // log of the largest row marginal
  std::vector<Real> weight;      // row marginals over the largest of them
  std::vector<Real> offset;      // smallest entry of each row; NaN where the row step gives NaN
  std::vector<Real> log_v;       // [stride], -inf beyond the columns
  std::vector<Real> largest;     // a score near the largest of each row, -inf where nothing can be sent
  std::vector<Real> sum;         // of exp(score - largest); 0 before the first iteration and where nothing can be sent
  std::vector<Real> block_sums;  // [block_count, stride]
};

template <typename Real>
Problem<Real>::Problem(const Real* cost, const Real* log_a, const Real* log_b, std::int64_t rows, std::int64_t columns,
                       double reg)
    : cost(cost), log_a(log_a), log_b(log_b), rows(rows), columns(columns), log_scale(0) {
  constexpr std::int64_t kLanes = kWidestVector / sizeof(Real);
  stride = (columns + kLanes - 1) / kLanes * kLanes;
  // Neither infinite, as 0 * inf would be NaN, nor 0, which times an infinite cost would be.
  using Limits = std::numeric_limits<Real>;
  inverse_reg = static_cast<Real>(std::clamp<double>(1 / reg, Limits::denorm_min(), Limits::max()));

  Real log_most = -kInfinity<Real>;
  for (std::int64_t row = 0; row < rows; ++row) log_most = std::max(log_most, log_a[row]);
  if (log_most > -kInfinity<Real>) log_scale = log_most;
  weight.resize(rows);
  for (std::int64_t row = 0; row < rows; ++row) weight[row] = static_cast<Real>(std::exp(log_a[row] - log_scale));

  offset.resize(rows);
  largest.resize(rows);
  sum.resize(rows);
  log_v.assign(stride, -kInfinity<Real>);
  std::copy_n(log_b, columns, log_v.begin());
  block_sums.resize(block_count() * stride);
}

template <typename Real, int kBytes>
ENGINE_INLINE void find_offsets_with(Problem<Real>& problem, std::int64_t begin, std::int64_t end) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  constexpr int kLanes = VectorOf<Real, kBytes>::kLanes;
  for (std::int64_t row = begin; row < end; ++row) {
    const Real* cost = problem.cost + row * problem.columns;
    Vector most = -kInfinity<Real> - Vector{};  // of the negated entries, NaN passed over
    Vector spoiled = {};                        // NaN once an entry was
    for (std::int64_t column = 0; column < problem.columns; column += kLanes) {
      const std::int64_t rest = problem.columns - column;
      const Vector entries =
          rest >= kLanes ? load<Vector>(cost + column) : load_part<Vector>(cost + column, rest, kInfinity<Real>);
      most = maximum<Vector>(-entries, most);
      spoiled = entries == entries ? spoiled : entries;
    }
    const Real least = -largest_lane<Real, kBytes>(most);
    Real offset = least == kInfinity<Real> ? Real(0) : least;  // a row of inf, or none
    if (least == -kInfinity<Real> || std::isnan(sum_of_lanes<Real, kBytes>(spoiled))) offset = kNan<Real>;
    problem.offset[row] = offset;
  }
}

// log_v_j - s_ij of as many columns as a vector holds, -inf beyond the last column.
template <typename Real, int kBytes>
ENGINE_INLINE typename VectorOf<Real, kBytes>::Type scores_with(const Problem<Real>& problem, const Real* cost,
                                                                Real offset, std::int64_t column) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  const std::int64_t rest = problem.columns - column;
  const Vector entries = rest >= VectorOf<Real, kBytes>::kLanes ? load<Vector>(cost + column)
                                                                : load_part<Vector>(cost + column, rest, offset);
  return load<Vector>(problem.log_v.data() + column) - (entries - offset) * problem.inverse_reg;
}

// plan_j = exp(log_v_j - s_ij - largest) for a row; returns the sum.
template <typename Real, int kBytes>
ENGINE_INLINE Real exponentiate_with(const Problem<Real>& problem, const Real* cost, Real offset, Real largest,
                                     Real* plan) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  Vector sums = {};
  for (std::int64_t column = 0; column < problem.columns; column += VectorOf<Real, kBytes>::kLanes) {
    __builtin_prefetch(cost + problem.columns + column);  // the next row, while this one keeps the arithmetic busy
    const Vector score = scores_with<Real, kBytes>(problem, cost, offset, column) - largest;
    const Vector term = exponential<Real, kBytes>(score < kMostExponent<Real> ? score : kMostExponent<Real> - Vector{});
    store(plan + column, term);
    sums += term;
  }
  return sum_of_lanes<Real, kBytes>(sums);
}

// The row step of rows [begin, end), and the sums of their columns into `column_sums` [stride]. `plan` [stride] is
// working space.
//
// Potentials move little from one iteration to the next: terms are taken over the largest of an earlier iteration, and
// the largest is looked for again only where their sum says that it is far off.
template <typename Real, int kBytes>
ENGINE_INLINE void visit_with(Problem<Real>& problem, std::int64_t begin, std::int64_t end, Real* plan,
                              Real* column_sums) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  constexpr int kLanes = VectorOf<Real, kBytes>::kLanes;
  std::fill_n(column_sums, problem.stride, Real(0));
  for (std::int64_t row = begin; row < end; ++row) {
    const Real* cost = problem.cost + row * problem.columns;
    const Real offset = problem.offset[row];
    Real& largest = problem.largest[row];
    Real& sum = problem.sum[row];
    if (sum > 0) sum = exponentiate_with<Real, kBytes>(problem, cost, offset, largest, plan);
    if (!(sum > kLeastSum<Real> && sum < 1 / kLeastSum<Real>)) {
      Vector most = -kInfinity<Real> - Vector{};
      for (std::int64_t column = 0; column < problem.columns; column += kLanes) {
        most = maximum<Vector>(scores_with<Real, kBytes>(problem, cost, offset, column), most);
      }
      largest = largest_lane<Real, kBytes>(most);
      sum = 0;
      if (largest == -kInfinity<Real>) continue;  // nothing can be sent
      sum = exponentiate_with<Real, kBytes>(problem, cost, offset, largest, plan);
    }
    const Real factor = problem.weight[row] / sum;
    for (std::int64_t column = 0; column < problem.stride; column += kLanes) {
      store<Vector>(column_sums + column, load<Vector>(column_sums + column) + load<Vector>(plan + column) * factor);
    }
  }
}

template <typename Real>
void find_offsets_portable(Problem<Real>& problem, std::int64_t begin, std::int64_t end) {
  find_offsets_with<Real, 16>(problem, begin, end);
}

template <typename Real>
void visit_portable(Problem<Real>& problem, std::int64_t begin, std::int64_t end, Real* plan, Real* column_sums) {
  visit_with<Real, 16>(problem, begin, end, plan, column_sums);
}

#ifdef ENGINE_X86
template <typename Real>
ENGINE_AVX2 void find_offsets_avx2(Problem<Real>& problem, std::int64_t begin, std::int64_t end) {
  find_offsets_with<Real, 32>(problem, begin, end);
}

template <typename Real>
ENGINE_AVX2 void visit_avx2(Problem<Real>& problem, std::int64_t begin, std::int64_t end, Real* plan,
                            Real* column_sums) {
  visit_with<Real, 32>(problem, begin, end, plan, column_sums);
}

template <typename Real>
ENGINE_AVX512 void find_offsets_avx512(Problem<Real>& problem, std::int64_t begin, std::int64_t end) {
  find_offsets_with<Real, 64>(problem, begin, end);
}

template <typename Real>
ENGINE_AVX512 void visit_avx512(Problem<Real>& problem, std::int64_t begin, std::int64_t end, Real* plan,
                                Real* column_sums) {
  visit_with<Real, 64>(problem, begin, end, plan, column_sums);
}
#endif

template <typename Real>
struct Kernels {
  void (*find_offsets)(Problem<Real>&, std::int64_t, std::int64_t) = find_offsets_portable<Real>;
  void (*visit)(Problem<Real>&, std::int64_t, std::int64_t, Real*, Real*) = visit_portable<Real>;
};

template <typename Real>
Kernels<Real> kernels() {
#ifdef ENGINE_X86
  if (isa() == Isa::avx512) return {find_offsets_avx512<Real>, visit_avx512<Real>};
  if (isa() == Isa::avx2) return {find_offsets_avx2<Real>, visit_avx2<Real>};
#endif
  return {};
}

// Column sums of the plan over `scale`. Together they are the weight of the rows that can send, so rounding may not
// make them more or less: iterations would add that up in log_u and -log_v, which leaves the plan as it is.
template <typename Real>
std::vector<double> column_sums(const Problem<Real>& problem) {
  std::vector<double> sums(problem.columns, 0.0);
  for (std::int64_t block = 0; block < problem.block_count(); ++block) {
    const Real* part = problem.block_sums.data() + block * problem.stride;
    for (std::int64_t column = 0; column < problem.columns; ++column) sums[column] += part[column];
  }
  double sent = 0;
  for (std::int64_t row = 0; row < problem.rows; ++row) {
    if (problem.largest[row] > -kInfinity<Real>) sent += problem.weight[row];
  }
  const double received = std::accumulate(sums.begin(), sums.end(), 0.0);
  if (received > 0) {
    for (double& sum : sums) sum *= sent / received;
  }
  return sums;
}

// log sum_i exp(log_u_i - s_ij) of a few columns, each from its largest term, into log_sums.
template <typename Real>
void repair(const Problem<Real>& problem, const std::vector<std::int64_t>& few, std::vector<double>& log_sums,
            int threads) {
  std::vector<double> log_u(problem.rows);
  for (std::int64_t row = 0; row < problem.rows; ++row) log_u[row] = problem.log_u(row);

  const auto body = [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> most(end - begin, -kInfinity<double>), sums(end - begin, 0.0);
    for (std::int64_t row = 0; row < problem.rows; ++row) {
      for (std::int64_t i = begin; i < end; ++i) {
        most[i - begin] = std::max(most[i - begin], log_u[row] - problem.scaled(row, few[i]));
      }
    }
    for (std::int64_t row = 0; row < problem.rows; ++row) {
      for (std::int64_t i = begin; i < end; ++i) {
        const double term = log_u[row] - problem.scaled(row, few[i]);
        if (term > -kInfinity<double>) sums[i - begin] += std::exp(term - most[i - begin]);
      }
    }
    for (std::int64_t i = begin; i < end; ++i) log_sums[few[i]] = most[i - begin] + std::log(sums[i - begin]);
  };
  parallel_for(static_cast<std::int64_t>(few.size()), kBlockColumns, threads, body);
}

// log (K^T u) of every column after a visit. Where so little arrived that entries of the plan may have been lost below
// the smallest normal number, it is summed anew in the log domain.
template <typename Real>
std::vector<double> log_columns(const Problem<Real>& problem, int threads) {
  using Limits = std::numeric_limits<Real>;
  const double trusted = double(problem.rows) * Limits::min() / (Limits::epsilon() * kLeastSum<Real>);
  std::vector<double> sums = column_sums(problem);
  std::vector<std::int64_t> lost;
  for (std::int64_t column = 0; column < problem.columns; ++column) {
    if (problem.log_v[column] == -kInfinity<Real>) {
      sums[column] = -kInfinity<double>;  // it has no weight or cannot be reached: it stays as it is
    } else if (sums[column] > trusted) {
      sums[column] = std::log(sums[column]) + problem.log_scale - problem.log_v[column];
    } else {
      lost.push_back(column);
    }
  }
  if (!lost.empty()) repair(problem, lost, sums, threads);
  return sums;
}

// Makes the column step and returns the error of the plan before it.
template <typename Real>
double column_step(const Problem<Real>& problem, const SinkhornSettings& settings, std::vector<Real>& log_v,
                   int threads) {
  const std::vector<double> log_column = log_columns(problem, threads);
  const double power = settings.relax > 0 ? settings.relax / (settings.relax + settings.reg) : 1;
  double error = 0;
  for (std::int64_t column = 0; column < problem.columns; ++column) {
    const double before = problem.log_v[column];
    const double after = divide(problem.log_b[column], log_column[column]) * power;
    if (settings.relax == 0) {
      error += std::abs(std::exp(before + log_column[column]) - std::exp(double(problem.log_b[column])));
    } else if (after != before) {
      error = std::max(error, std::abs(after - before));
    }
    log_v[column] = static_cast<Real>(after);
  }
  return error;
}

// Whether a visit gave NaN for a row that weighs: as all columns hear of it, there is nothing to go on with.
template <typename Real>
bool spoiled(const Problem<Real>& problem) {
  for (std::int64_t row = 0; row < problem.rows; ++row) {
    if (std::isnan(problem.offset[row])) return true;
    if (std::isnan(problem.log_a[row]) && problem.largest[row] > -kInfinity<Real>) return true;
  }
  return false;
}

template <typename Real>
void solve(Problem<Real>& problem, const SinkhornSettings& settings, const Kernels<Real>& run, Real* log_u, Real* log_v,
           std::int64_t* iterations, Real* error, int threads) {
  const std::int64_t worthwhile = 1 + problem.rows * problem.columns / kEntriesPerThread;
  const int workers = static_cast<int>(std::clamp<std::int64_t>(threads, 1, worthwhile));
  parallel_for(problem.rows, kBlockRows, workers,
               [&](std::int64_t begin, std::int64_t end) { run.find_offsets(problem, begin, end); });
  if (std::any_of(problem.log_b, problem.log_b + problem.columns, [](Real log_b) { return std::isnan(log_b); })) {
    std::fill(problem.offset.begin(), problem.offset.end(), kNan<Real>);
  }

  const auto visit = [&](std::int64_t begin, std::int64_t end) {
    std::vector<Real> plan(problem.stride);
    run.visit(problem, begin, end, plan.data(), problem.block_sums.data() + begin / kBlockRows * problem.stride);
  };
  std::vector<Real> next = problem.log_v;
  bool active = true;
  for (std::int64_t iteration = 1; active; ++iteration) {
    std::copy(next.begin(), next.end(), problem.log_v.begin());
    parallel_for(problem.rows, kBlockRows, workers, visit);
    const bool stop = iteration == 1 && spoiled(problem);
    *error = stop ? kNan<Real> : static_cast<Real>(column_step(problem, settings, next, workers));
    *iterations = problem.rows > 0 ? iteration : 0;
    active = problem.rows > 0 && iteration < settings.max_iter && *error > static_cast<Real>(settings.tol);
  }

  for (std::int64_t row = 0; row < problem.rows; ++row) {
    log_u[row] = static_cast<Real>(problem.log_u(row) + double(problem.offset[row]) / settings.reg);
  }
  std::copy_n(problem.log_v.begin(), problem.columns, log_v);
}

}  // namespace

template <typename Real>
void sinkhorn(const Real* cost, const Real* log_a, const Real* log_b, std::int64_t problems, std::int64_t rows,
              std::int64_t columns, const SinkhornSettings& settings, Real* log_u, Real* log_v,
              std::int64_t* iterations, Real* error, int threads) {
  const Kernels<Real> run = kernels<Real>();
  // Many problems share the threads among them, few have all threads each.
  const int inside = problems < threads ? threads : 1;
  parallel_for(problems, 1, inside > 1 ? 1 : threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      Problem<Real> problem(cost + i * rows * columns, log_a + i * rows, log_b + i * columns, rows, columns,
                            settings.reg);
      solve(problem, settings, run, log_u + i * rows, log_v + i * columns, iterations + i, error + i, inside);
    }
  });
}

template void sinkhorn(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t,
                       const SinkhornSettings&, float*, float*, std::int64_t*, float*, int);
template void sinkhorn(const double*, const double*, const double*, std::int64_t, std::int64_t, std::int64_t,
                       const SinkhornSettings&, double*, double*, std::int64_t*, double*, int);

}  // namespace engine

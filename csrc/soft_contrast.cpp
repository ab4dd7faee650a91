#include "soft_contrast.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "contrast.h"
#include "parallel.h"

namespace engine {
namespace {

// Scores of a block that are kept from the first pass over the bank for the second. Those of a larger bank are computed
// twice: a bank of prototypes fits.
constexpr std::int64_t kKeptEntries = 1 << 18;

// The rows of one block: one pass over the bank for the normalisers, a second for losses and gradients.
template <typename Real>
class Task {
 public:
  Task(const StoredRows<Real>& bank, const StoredRows<Real>& weights, std::int64_t bank_count, double temperature,
       std::int64_t lanes)
      : bank_(bank),
        weights_(weights),
        bank_count_(bank_count),
        temperature_(temperature),
        keep_((bank_count + kContrastStripe) * lanes <= kKeptEntries),
        block_(isa(), bank.width(), lanes),
        scores_((keep_ ? bank_count + kContrastStripe : kContrastStripe) * lanes) {}

  void run(const Real* features, std::int64_t first_row, std::int64_t count, Real* losses, Real* gradients) {
    std::vector<const Real*> rows(count);
    std::vector<Real*> targets(gradients == nullptr ? 0 : count);
    for (std::int64_t i = 0; i < count; ++i) rows[i] = features + i * bank_.width();
    for (std::size_t i = 0; i < targets.size(); ++i) targets[i] = gradients + i * bank_.width();
    if (gradients != nullptr) std::fill_n(gradients, count * bank_.width(), Real(0));

    block_.set_features(rows.data(), count, temperature_);
    each_stripe([&](std::int64_t first, std::int64_t stripe, const Real* bank_rows) {
      Real* scores = scores_at(first);
      block_.score(bank_rows, stripe, scores);
      block_.accumulate(scores, stripe, false);
    });

    std::vector<double> log_sums(count), totals(count, 0.0), sums(count, 0.0);
    for (std::int64_t i = 0; i < count; ++i) {
      log_sums[i] = block_.largest(i) + std::log(block_.sum(i));
      for (std::int64_t first = 0; first < bank_count_; first += kContrastStripe) {
        const std::int64_t stripe = std::min(kContrastStripe, bank_count_ - first);
        const Real* weights = weights_at(first_row + i, first, stripe);
        totals[i] += std::accumulate(weights, weights + stripe, 0.0);
      }
    }
    each_stripe([&](std::int64_t first, std::int64_t stripe, const Real* bank_rows) {
      Real* scores = scores_at(first);
      if (!keep_) block_.score(bank_rows, stripe, scores);
      for (std::int64_t i = 0; i < count; ++i) {
        const Real* weights = weights_at(first_row + i, first, stripe);
        double sum = 0;  // of the stripe alone: rounding grows with the length of a sum
        for (std::int64_t j = 0; j < stripe; ++j) {
          sum += weights[j] * (log_sums[i] - scores[j * block_.lanes() + i]);
        }
        sums[i] += sum;
      }
      if (gradients == nullptr) return;
      block_.exponentiate(scores, stripe);
      for (std::int64_t i = 0; i < count; ++i) {
        const Real* weights = weights_at(first_row + i, first, stripe);
        const Real share = static_cast<Real>(totals[i] / (block_.sum(i) * temperature_));
        for (std::int64_t j = 0; j < stripe; ++j) {
          Real& residual = scores[j * block_.lanes() + i];
          residual = share * residual - weights[j] / static_cast<Real>(temperature_);
        }
      }
      block_.spread(scores, bank_rows, stripe, targets.data());
    });
    for (std::int64_t i = 0; i < count; ++i) losses[i] = static_cast<Real>(sums[i]);
  }

 private:
  template <typename Visit>
  void each_stripe(const Visit& visit) {
    for (std::int64_t first = 0; first < bank_count_; first += kContrastStripe) {
      const std::int64_t stripe = std::min(kContrastStripe, bank_count_ - first);
      visit(first, stripe, bank_.block(first, stripe, converted_));
    }
  }

  Real* scores_at(std::int64_t first) { return scores_.data() + (keep_ ? first * block_.lanes() : 0); }

  const Real* weights_at(std::int64_t row, std::int64_t first, std::int64_t stripe) {
    return weights_.block(row * bank_count_ + first, stripe, converted_weights_);
  }

  const StoredRows<Real>& bank_;
  const StoredRows<Real>& weights_;
  std::int64_t bank_count_;
  double temperature_;
  bool keep_;
  ContrastBlock<Real> block_;
  std::vector<Real> scores_;
  std::vector<Real> converted_, converted_weights_;
};

}  // namespace

template <typename Real>
void soft_contrast(const Real* features, const StoredRows<Real>& bank, const StoredRows<Real>& weights,
                   std::int64_t batch, std::int64_t bank_count, double temperature, Real* losses, Real* gradients,
                   int threads) {
  const std::int64_t width = bank.width();
  const std::int64_t lanes = ContrastBlock<Real>::choose_lanes(batch, threads);
  parallel_for(batch, lanes, threads, [&](std::int64_t begin, std::int64_t end) {
    Task<Real>(bank, weights, bank_count, temperature, lanes)
        .run(features + begin * width, begin, end - begin, losses + begin,
             gradients == nullptr ? nullptr : gradients + begin * width);
  });
}

template void soft_contrast(const float*, const StoredRows<float>&, const StoredRows<float>&, std::int64_t,
                            std::int64_t, double, float*, float*, int);
template void soft_contrast(const double*, const StoredRows<double>&, const StoredRows<double>&, std::int64_t,
                            std::int64_t, double, double*, double*, int);

}  // namespace engine

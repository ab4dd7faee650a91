#include "neighbor_contrast.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "contrast.h"
#include "parallel.h"

namespace engine {
namespace {

// The positives of a row, ascending, and their scores as the stripes pass by.
template <typename Real>
struct Positives {
  Positives(const std::int64_t* set, std::int64_t set_size, std::int64_t bank_count) {
    indices.reserve(set_size);
    std::copy_if(set, set + set_size, std::back_inserter(indices),
                 [=](std::int64_t index) { return 0 <= index && index < bank_count; });
    std::sort(indices.begin(), indices.end());
    indices.erase(std::unique(indices.begin(), indices.end()), indices.end());
    scores.reserve(indices.size());
  }

  std::vector<std::int64_t> indices;
  std::vector<Real> scores;
};

// The rows of one block: online softmax over the stripes of the bank. A gradient row gathers sum_j e^{s_ij - largest_i}
// m_j and is multiplied down whenever a larger score appears, so that one pass over the bank gives losses and
// gradients.
template <typename Real>
class Task {
 public:
  Task(const StoredRows<Real>& bank, std::int64_t bank_count, double temperature, std::int64_t lanes)
      : bank_(bank), bank_count_(bank_count), temperature_(temperature), block_(isa(), bank.width(), lanes) {
    scores_.resize(kContrastStripe * lanes);
  }

  void run(const std::vector<const Real*>& features, std::vector<Positives<Real>>& positives,
           const std::vector<Real*>& losses, const std::vector<Real*>& gradients) {
    const std::int64_t count = static_cast<std::int64_t>(features.size());
    block_.set_features(features.data(), count, temperature_);
    for (Real* gradient : gradients) std::fill_n(gradient, bank_.width(), Real(0));
    for (std::int64_t first = 0; first < bank_count_; first += kContrastStripe) {
      visit(first, std::min(kContrastStripe, bank_count_ - first), positives, gradients);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      finish(i, positives[i], losses[i], gradients.empty() ? nullptr : gradients[i]);
    }
  }

 private:
  void visit(std::int64_t first, std::int64_t stripe, std::vector<Positives<Real>>& positives,
             const std::vector<Real*>& gradients) {
    const Real* rows = bank_.block(first, stripe, converted_);
    Real* scores = scores_.data();
    block_.score(rows, stripe, scores);
    for (std::int64_t i = 0; i < block_.count(); ++i) {
      Positives<Real>& own = positives[i];
      while (own.scores.size() < own.indices.size() && own.indices[own.scores.size()] < first + stripe) {
        own.scores.push_back(scores[(own.indices[own.scores.size()] - first) * block_.lanes() + i]);
      }
    }
    const bool with_gradient = !gradients.empty();
    block_.accumulate(scores, stripe, with_gradient);
    if (!with_gradient) return;
    for (std::int64_t i = 0; i < block_.count(); ++i) {
      const Real factor = block_.rescale(i);
      if (factor == Real(1)) continue;
      for (std::int64_t k = 0; k < bank_.width(); ++k) gradients[i][k] *= factor;
    }
    block_.spread(scores, rows, stripe, gradients.data());
  }

  void finish(std::int64_t i, const Positives<Real>& positives, Real* loss, Real* gradient) {
    const Real most = *std::max_element(positives.scores.begin(), positives.scores.end());
    double sum = 0;
    for (const Real score : positives.scores) sum += std::exp(static_cast<double>(score - most));
    *loss = static_cast<Real>(block_.largest(i) - most + std::log(block_.sum(i)) - std::log(sum));
    if (gradient == nullptr) return;
    const Real share = static_cast<Real>(1 / (block_.sum(i) * temperature_));
    for (std::int64_t k = 0; k < bank_.width(); ++k) gradient[k] *= share;
    for (std::size_t place = 0; place < positives.indices.size(); ++place) {
      const double target = std::exp(static_cast<double>(positives.scores[place] - most)) / sum;
      const Real weight = static_cast<Real>(target / temperature_);
      const Real* row = bank_.block(positives.indices[place], 1, converted_);
      for (std::int64_t k = 0; k < bank_.width(); ++k) gradient[k] -= weight * row[k];
    }
  }

  const StoredRows<Real>& bank_;
  std::int64_t bank_count_;
  double temperature_;
  ContrastBlock<Real> block_;
  std::vector<Real> scores_;
  std::vector<Real> converted_;
};

}  // namespace

template <typename Real>
void neighbor_contrast(const Real* features, const StoredRows<Real>& bank, const std::int64_t* positives,
                       std::int64_t batch, std::int64_t bank_count, std::int64_t set_size, double temperature,
                       Real* losses, Real* gradients, int threads) {
  const std::int64_t width = bank.width();
  std::vector<std::int64_t> kept;  // rows with a positive
  for (std::int64_t row = 0; row < batch; ++row) {
    const std::int64_t* set = positives + row * set_size;
    if (std::any_of(set, set + set_size, [=](std::int64_t index) { return 0 <= index && index < bank_count; })) {
      kept.push_back(row);
      continue;
    }
    losses[row] = 0;
    if (gradients != nullptr) std::fill_n(gradients + row * width, width, Real(0));
  }
  const std::int64_t kept_count = static_cast<std::int64_t>(kept.size());
  const std::int64_t lanes = ContrastBlock<Real>::choose_lanes(kept_count, threads);
  parallel_for(kept_count, lanes, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<const Real*> block_features;
    std::vector<Positives<Real>> block_positives;
    std::vector<Real*> block_losses, block_gradients;
    for (std::int64_t place = begin; place < end; ++place) {
      const std::int64_t row = kept[place];
      block_features.push_back(features + row * width);
      block_positives.emplace_back(positives + row * set_size, set_size, bank_count);
      block_losses.push_back(losses + row);
      if (gradients != nullptr) block_gradients.push_back(gradients + row * width);
    }
    Task<Real>(bank, bank_count, temperature, lanes)
        .run(block_features, block_positives, block_losses, block_gradients);
  });
}

template void neighbor_contrast(const float*, const StoredRows<float>&, const std::int64_t*, std::int64_t, std::int64_t,
                                std::int64_t, double, float*, float*, int);
template void neighbor_contrast(const double*, const StoredRows<double>&, const std::int64_t*, std::int64_t,
                                std::int64_t, std::int64_t, double, double*, double*, int);

}  // namespace engine

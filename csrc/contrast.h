// What the losses against a memory bank share: a block of feature rows meets the bank stripe after stripe.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace engine {

// Rows of the bank that are taken at a time: their scores stay in the first-level cache of a core.
constexpr std::int64_t kContrastStripe = 96;

// Up to `lanes` feature rows side by side, so that one vector holds the scores of many rows with one row of the bank.
// Memory is that of the block and of one stripe; the results for a feature row do not depend on the others or on
// `lanes`.
//
// Entry (j, i) of the scores of a stripe, of its row j and feature i, lies at j * lanes() + i.
template <typename Real>
class ContrastBlock {
 public:
  // The widest block is the fastest; half of it where there would be fewer blocks than threads.
  static std::int64_t choose_lanes(std::int64_t row_count, int threads);

  ContrastBlock(Isa isa, std::int64_t width, std::int64_t lanes);

  std::int64_t lanes() const { return lanes_; }
  std::int64_t count() const { return count_; }

  // Takes the features [count, width] that `rows` point to, count <= lanes, and starts anew.
  void set_features(const Real* const* rows, std::int64_t count, double temperature);

  // scores[j, i] = bank_rows[j] . features[i] / temperature for `stripe` <= kContrastStripe rows.
  void score(const Real* bank_rows, std::int64_t stripe, Real* scores);

  // Takes scores into the running maximum and sum of each feature. With `replace` they become exp(score - largest(i)).
  // What a caller summed with the largest score of before is to be multiplied by rescale(i) <= 1.
  void accumulate(Real* scores, std::int64_t stripe, bool replace);

  // Scores that were accumulated become exp(score - largest(i)).
  void exponentiate(Real* scores, std::int64_t stripe);

  // targets[i] += sum_j weights[j, i] * bank_rows[j], rows of `width` entries; one per feature.
  void spread(const Real* weights, const Real* bank_rows, std::int64_t stripe, Real* const* targets);

  Real largest(std::int64_t i) const { return largest_[i]; }
  Real rescale(std::int64_t i) const { return rescale_[i]; }
  // Sum of exp(score - largest(i)); NaN where a score was NaN or infinite.
  double sum(std::int64_t i) const { return sum_[i]; }

 private:
  // targets[row][v] += sum_k left[row * row_step + k * depth_step] * right[k * right_step + v], for panel_rows rows
  // and the entries v of two vectors (score) or three (spread).
  using Tile = void (*)(const Real* left, std::int64_t row_step, std::int64_t depth_step, const Real* right,
                        std::int64_t right_step, std::int64_t depth, Real* const* targets);
  using Exponentiate = void (*)(Real* scores, std::int64_t stripe, std::int64_t lanes, bool replace, Real* largest,
                                Real* rescale, Real* sums, Real* poison);
  struct Kernel {
    std::int64_t panel_rows;
    std::int64_t vector;  // entries of one
    Tile score, spread;
    Exponentiate exponentiate;
  };
  static Kernel choose(Isa isa);

  Kernel kernel_;
  std::int64_t width_;
  std::int64_t lanes_;
  std::int64_t count_ = 0;
  std::vector<Real> features_;   // [width, lanes], over the temperature
  std::vector<Real> last_rows_;  // the last rows of a bank, made up to a panel with zeros
  std::vector<Real> panel_;      // [stripe, panel columns] of the bank
  std::vector<Real> edge_;       // [panel_rows, panel columns], for targets that end within a panel
  std::vector<Real> largest_, rescale_, stripe_sum_, poison_;
  std::vector<double> sum_;
};

}  // namespace engine

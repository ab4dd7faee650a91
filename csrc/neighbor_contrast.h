// Contrast of features against a bank, with a set of positives per feature.
#pragma once

#include <cstdint>

#include "rows.h"

namespace engine {

// losses[i] = log sum_j e^{s_ij} - log sum_{j in P_i} e^{s_ij}, s_ij = features[i] . bank[j] / temperature, and, where
// `gradients` is not null, gradients[i] = d losses[i] / d features[i], [batch, width].
//
// positives [batch, set_size] holds P_i in any order, repeats and what is not in [0, bank_count) left out. A row whose
// set is empty gets loss 0 and gradient 0.
template <typename Real>
void neighbor_contrast(const Real* features, const StoredRows<Real>& bank, const std::int64_t* positives,
                       std::int64_t batch, std::int64_t bank_count, std::int64_t set_size, double temperature,
                       Real* losses, Real* gradients, int threads);

}  // namespace engine

// Contrast of features against a bank, with a weight for every row of it.
#pragma once

#include <cstdint>

#include "rows.h"

namespace engine {

// losses[i] = sum_j weights[i, j] (log sum_l e^{s_il} - s_ij), s_ij = features[i] . bank[j] / temperature, and, where
// `gradients` is not null, gradients[i] = d losses[i] / d features[i], [batch, width]. weights [batch * bank_count, 1].
template <typename Real>
void soft_contrast(const Real* features, const StoredRows<Real>& bank, const StoredRows<Real>& weights,
                   std::int64_t batch, std::int64_t bank_count, double temperature, Real* losses, Real* gradients,
                   int threads);

}  // namespace engine

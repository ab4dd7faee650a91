"""Cross entropy of features against a bank of prototypes with soft targets."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._contrast import softmax_of
from engine.ops._precision import products


def soft_contrast(
    features: Tensor, bank: Tensor, weights: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Losses [B] and, when asked for, their gradients [B, D], float32.

    With W_i = sum_j w_ij the loss is W_i log sum_j e^{s_ij} - sum_j w_ij s_ij, and its gradient
    (W_i sum_j p_ij m_j - sum_j w_ij m_j) / t: the second sum is a product that knows nothing of the scores.
    """
    features, bank, weights = features.contiguous(), bank.contiguous(), weights.contiguous()
    row_count, width = features.shape
    gradient = features.new_zeros(row_count if with_gradient else 0, width, dtype=torch.float32)
    if row_count == 0 or bank.shape[0] == 0:
        return features.new_zeros(row_count, dtype=torch.float32), gradient
    gathered = gradient if with_gradient else None
    softmax = softmax_of(features, bank, temperature, gathered=gathered, weights=weights, precision=precision)
    totals = weights.sum(dim=1, dtype=torch.float32)
    losses = totals * (softmax.largest + softmax.sums.log()) - softmax.products
    if with_gradient:
        gradient *= (totals / softmax.sums).unsqueeze(1)
        with products(features.device, precision):
            gradient.addmm_(weights.float(), bank.float(), alpha=-1)
        gradient.div_(temperature)
    return losses, gradient

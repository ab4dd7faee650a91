"""Cross entropy of features against a bank of prototypes with soft targets."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._contrast import problems, softmax_of
from engine.ops._precision import products
from engine.ops._problems import merge


def soft_contrast(
    features: Tensor, bank: Tensor, weights: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and, when asked for, their gradients [..., B, D], float32.

    With W_i = sum_j w_ij the loss is W_i log sum_j e^{s_ij} - sum_j w_ij s_ij, and its gradient
    (W_i sum_j p_ij m_j - sum_j w_ij m_j) / t: the second sum is a product that knows nothing of the scores.
    """
    *leading, row_count, width = features.shape
    gradient = features.new_zeros(*leading, row_count if with_gradient else 0, width, dtype=torch.float32)
    if weights.numel() == 0:
        return features.new_zeros(*leading, row_count, dtype=torch.float32), gradient
    (features, bank), weights = problems(features, bank), merge(weights).contiguous()
    gathered = gradient.view(features.shape) if with_gradient else None
    softmax = softmax_of(features, bank, temperature, gathered=gathered, weights=weights, precision=precision)
    totals = weights.sum(dim=-1, dtype=torch.float32)
    losses = totals * (softmax.largest + softmax.sums.log()) - softmax.products
    if gathered is not None:
        gathered *= (totals / softmax.sums).unsqueeze(-1)
        with products(features.device, precision):
            gathered.baddbmm_(weights.float(), bank.float(), alpha=-1)
        gathered.div_(temperature)
    return losses.view(*leading, row_count), gradient

"""Losses that are no operator of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def instance_contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """In-batch instance contrast of two views, both ways: `mean_i -log softmax_j(a_i . b_j / t)[i]`, and with a, b swapped.

    Args:
        first, second: `[B, D]` unit rows, the i-th of both from the same image; gradient to both.

    Returns:
        Scalar.
    """
    logits = first @ second.T / temperature
    target = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

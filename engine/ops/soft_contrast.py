"""Cross entropy of features against a bank of prototypes with soft targets."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check, _contrast, _native


def soft_contrast(
    features: Tensor,
    bank: Tensor,
    weights: Tensor,
    temperature: float,
    *,
    reduction: str = "mean",
    precision: str = "ieee",
) -> Tensor:
    """`-sum_j w_ij log softmax_j(f_i . m_j / t)`, FIRM Eq. 18.

    Args:
        features: `[..., B, D]` float32, float16, bfloat16 or float64; the gradient goes here. The dimensions before
            the last two, if any, count problems: each has its bank and its loss, and all are computed together.
        bank: `[..., C, D]` float, constant.
        weights: `[..., B, C]` float, constant; a row need not sum to 1.
        temperature: t > 0.
        reduction: "mean" over the B rows of a problem, "sum", or "none" for `[..., B]` losses.
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        The loss `[...]`, a scalar for one problem, in float32, or float64 if features or bank are float64. Without any
        row it is 0.

    Raises:
        TypeError, ValueError: an argument is not as described, or bank or weights require a gradient.
        NotImplementedError: a second derivative is asked for.

    Example:
        >>> features = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> weights = torch.tensor([[0.9, 0.1]])
        >>> loss = ops.soft_contrast(features, prototypes, weights, temperature=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.3269
    """
    _contrast.check(features, bank, temperature, reduction, precision)
    _check.tensor("weights", weights, "... B C")
    _check.leading("weights", weights, 2, features.shape[:-2], "features")
    _check.like("weights", weights, "features", features, dtype=False)
    _check.size("weights", weights, -2, features.shape[-2], "the rows of features")
    _check.size("weights", weights, -1, bank.shape[-2], "the rows of bank")
    _check.constant("weights", weights)
    losses = _contrast.losses_of(_operator, features, bank, weights, temperature, precision)
    return _contrast.reduce(losses, torch.ones_like(losses), reduction)


def reference(
    features: Tensor,
    bank: Tensor,
    weights: Tensor,
    temperature: float,
    *,
    reduction: str = "mean",
    precision: str = "ieee",
) -> Tensor:
    """The definition, on the whole [..., B, C] logits."""
    losses = _row_losses(_contrast.logits(features, bank, temperature, precision), weights)
    return _contrast.reduce(losses, torch.ones_like(losses), reduction)


def rows(
    features: Tensor, bank: Tensor, weights: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and their gradients [..., B, D], in blocks of rows of the definition."""
    arguments = (features, bank, weights, temperature, with_gradient, precision)
    return _contrast.in_blocks(_row_losses, _residual, *arguments)


def cpu(
    features: Tensor, bank: Tensor, weights: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """csrc/soft_contrast.cpp: the scores of a block of rows, then what is left of them once normalised."""
    return _contrast.native("soft_contrast", features, bank, weights, _native.rows, (), temperature, with_gradient)


_operator = _contrast.row_operator("soft_contrast")


def _row_losses(logits: Tensor, weights: Tensor) -> Tensor:
    return -(weights.to(logits.dtype) * logits.log_softmax(dim=-1)).sum(dim=-1)


def _residual(logits: Tensor, weights: Tensor) -> Tensor:
    weights = weights.to(logits.dtype)
    return weights.sum(dim=1, keepdim=True) * logits.softmax(dim=1) - weights

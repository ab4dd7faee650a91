"""Contrast of features against an instance bank with a set of positives per row."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check, _contrast, _native


def neighbor_contrast(
    features: Tensor,
    bank: Tensor,
    positives: Tensor,
    temperature: float,
    *,
    reduction: str = "mean",
    precision: str = "ieee",
) -> Tensor:
    """`-log( sum_{j in P_i} e^{s_ij} / sum_j e^{s_ij} )` with `s_ij = f_i . m_j / t`, SALCR Eq. 18, 19, 24, 25.

    Args:
        features: `[..., B, D]` float32, float16, bfloat16 or float64; the gradient goes here. The dimensions before
            the last two, if any, count problems: each has its bank and its loss, and all are computed together.
        bank: `[..., N, D]` float, constant.
        positives: `[..., B, P]` int64 in [-1, N), the set P_i of each row in any order, padded with -1. A row without
            a positive is left out, of the mean too.
        temperature: t > 0.
        reduction: "mean" over the rows of a problem that are not left out, "sum", or "none" for `[..., B]` losses, 0
            where left out.
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        The loss `[...]`, a scalar for one problem, in float32, or float64 if an input is float64. Without any row it is
        0, with gradient 0.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bank requires a gradient.
        NotImplementedError: a second derivative is asked for.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
        >>> positives = torch.tensor([[0, 1], [-1, -1]])  # the second row has none
        >>> loss = ops.neighbor_contrast(features, bank, positives, temperature=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4), features.grad[1].tolist()
        (0.0779, [0.0, 0.0])
    """
    _contrast.check(features, bank, temperature, reduction, precision)
    _check.indices("positives", positives, "... B P")
    _check.leading("positives", positives, 2, features.shape[:-2], "features")
    _check.like("positives", positives, "features", features, dtype=False)
    _check.size("positives", positives, -2, features.shape[-2], "the rows of features")
    _check.in_range("positives", positives, bank.shape[-2])
    losses = _contrast.losses_of(_operator, features, bank, positives, temperature, precision)
    return _contrast.reduce(losses, _valid(positives, bank.shape[-2]).any(dim=-1), reduction)


def reference(
    features: Tensor,
    bank: Tensor,
    positives: Tensor,
    temperature: float,
    *,
    reduction: str = "mean",
    precision: str = "ieee",
) -> Tensor:
    """The definition, on the whole [..., B, N] logits."""
    losses = _row_losses(_contrast.logits(features, bank, temperature, precision), positives)
    return _contrast.reduce(losses, _valid(positives, bank.shape[-2]).any(dim=-1), reduction)


def rows(
    features: Tensor, bank: Tensor, positives: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and their gradients [..., B, D], in blocks of rows of the definition."""
    arguments = (features, bank, positives, temperature, with_gradient, precision)
    return _contrast.in_blocks(_row_losses, _residual, *arguments)


def cpu(
    features: Tensor, bank: Tensor, positives: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """csrc/neighbor_contrast.cpp: an online softmax in one pass over the bank."""
    arguments = (features, bank, positives, _native.address, positives.shape[-1:], temperature, with_gradient)
    return _contrast.native("neighbor_contrast", *arguments)


_operator = _contrast.row_operator("neighbor_contrast")


def _valid(positives: Tensor, bank_count: int) -> Tensor:
    return (positives >= 0) & (positives < bank_count)


def _positive_logits(logits: Tensor, positives: Tensor) -> Tensor:
    """The logits with -inf at the others; of a row without a positive all remain: its loss and gradient are then 0."""
    *outer, bank_count = logits.shape
    valid = _valid(positives, bank_count)
    mask = torch.zeros(*outer, bank_count + 1, dtype=torch.bool, device=logits.device)
    mask = mask.scatter(-1, torch.where(valid, positives, bank_count), True)[..., :bank_count]
    return torch.where(mask | ~valid.any(dim=-1, keepdim=True), logits, -torch.inf)


def _row_losses(logits: Tensor, positives: Tensor) -> Tensor:
    if logits.shape[-1] == 0:  # the logarithm of an empty sum is -inf, and inf - inf no loss
        return logits.sum(dim=-1)
    return logits.logsumexp(dim=-1) - _positive_logits(logits, positives).logsumexp(dim=-1)


def _residual(logits: Tensor, positives: Tensor) -> Tensor:
    return logits.softmax(dim=1) - _positive_logits(logits, positives).softmax(dim=1)

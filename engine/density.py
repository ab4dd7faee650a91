"""Density of prototypes: a mixture of two diagonal Gaussians whose statistics follow by moving averages (FIRM Eq. 19)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 0.1
"""Least variance of a dimension, in parts of 1 / D, which is what unit rows have there on average."""


@torch.no_grad()
def begin(rows: Tensor) -> Tensor:
    """Sufficient statistics `[2, 1 + 2 D]` per Gaussian: sums of weights, of weighted rows and of their squares, over N.

    The rows are halved along the direction in which they differ most.

    Args:
        rows: `[N, D]` unit rows.
    """
    centred = rows - rows.mean(0)
    direction = (
        torch.linalg.svd(centred, full_matrices=False).Vh[:1].T if len(rows) else rows.new_zeros(rows.shape[1], 1)
    )
    side = (centred @ direction > 0).to(rows.dtype)
    return _statistics(rows, torch.cat([side, 1 - side], dim=1))


@torch.no_grad()
def follow(statistics: Tensor, rows: Tensor, momentum: float) -> Tensor:
    """The statistics after one step of expectation and maximisation with `rows`, as a moving average."""
    weights = _joint(statistics, rows).softmax(1)
    return momentum * statistics + (1 - momentum) * _statistics(rows, weights)


def negative_log_likelihood(statistics: Tensor, rows: Tensor) -> Tensor:
    """`-mean_k log g(row_k) / D`; the gradient goes to `rows` `[N, D]`."""
    return -_joint(statistics, rows).logsumexp(1).mean() / rows.shape[1]


def _statistics(rows: Tensor, weights: Tensor) -> Tensor:
    every = torch.cat([torch.ones_like(rows[:, :1]), rows, rows.square()], dim=1)
    return weights.T @ every / max(len(rows), 1)


def _joint(statistics: Tensor, rows: Tensor) -> Tensor:
    """`[N, 2]` log of weight times density; a Gaussian without weight takes part in nothing."""
    width = rows.shape[1]
    weight, first, second = statistics.split([1, width, width], dim=1)
    mean = first / weight.clamp(min=1e-6)
    variance = (second / weight.clamp(min=1e-6) - mean.square()).clamp(min=FLOOR / width)
    distance = ((rows.unsqueeze(1) - mean).square() / variance).sum(2)
    share = weight / weight.sum().clamp(min=1e-6)
    return share.clamp(min=1e-6).log().T - (distance + variance.log().sum(1) + width * math.log(2 * math.pi)) / 2

"""Labels by optimal transport between features and prototypes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, check_precision, products
from engine.ops.sinkhorn import argmax, check_settings, check_weight, log_weight, scale, solve

COST_BYTES = 1 << 29
"""Costs above this size are not kept but computed anew at every iteration, in blocks of a sixteenth of it."""


@torch.no_grad()
def ot_assign(
    features: Tensor,
    prototypes: Tensor,
    reg: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    relax: float | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
    precision: str = "ieee",
) -> Tensor:
    """`argmax_j Q_ij` of the transport plan Q with cost `||f_i - m_j||^2`: SALCR (IJCV 2025) Eq. 4, 5.

    The plan is never made: of `Q_ij = u_i exp(-cost_ij / reg) v_j` the factor u_i does not move the argmax.

    Args:
        features: `[N, D]` float32, float16, bfloat16 or float64; no gradient is computed.
        prototypes: `[C, D]`, likewise.
        reg, a, b, relax, max_iter, tol: as in `sinkhorn`.
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        `[N]` int64, the lower index on ties; -1 where there is no prototype.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [1.0]])
        >>> prototypes = torch.tensor([[0.0], [1.0]])
        >>> ops.ot_assign(features, prototypes, reg=0.05)  # each prototype takes half of the features
        tensor([0, 0, 1, 1])
    """
    _check.tensor("features", features, "N D")
    _check.tensor("prototypes", prototypes, "C D")
    _check.like("prototypes", prototypes, "features", features, dtype=False)
    _check.size("prototypes", prototypes, 1, features.shape[1], "the width of features")
    _check.no_nan("features", features)
    _check.no_nan("prototypes", prototypes)
    check_settings(reg, relax, tol)
    max_iter = _check.count("max_iter", max_iter, 1)
    check_precision(precision)
    check_weight("a", a, features.shape[:1], features)
    check_weight("b", b, prototypes.shape[:1], features)
    function = pick("ot_assign", features, prototypes)
    return function(features, prototypes, reg, a=a, b=b, relax=relax, max_iter=max_iter, tol=tol, precision=precision)


def reference(
    features: Tensor,
    prototypes: Tensor,
    reg: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    relax: float | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
    precision: str = "ieee",
) -> Tensor:
    """`sinkhorn` on the cost, or, where it is not kept, `sinkhorn.solve` on blocks of rows of it."""
    centres = prototypes.to(accumulation_dtype(features, prototypes))
    if _fits(features, centres):
        cost = _cost(features, centres, precision)
        log_v = pick("sinkhorn", cost)(cost, reg, a=a, b=b, relax=relax, max_iter=max_iter, tol=tol).log_v
        return torch.cat([argmax(log_v - scale(block, reg)) for block in cost.split(_block_rows(centres))])

    def costs() -> Iterable[Tensor]:
        return (scale(_cost(rows, centres, precision), reg) for rows in features.split(_block_rows(centres)))

    log_a, log_b = log_weight(a, features.shape[:1], centres), log_weight(b, prototypes.shape[:1], centres)
    log_v = solve(costs, log_a, log_b, reg, relax, max_iter, tol)[1]
    return torch.cat([argmax(log_v - block) for block in costs()])


cpu = reference
"""`sinkhorn` runs on the same back end. A cost that is not kept takes the time of its products anyway."""


def _cost(features: Tensor, centres: Tensor, precision: str) -> Tensor:
    """`||f_i - m_j||^2` without `||f_i||^2`, which is the same for a whole row: the row step absorbs it."""
    with products(features.device, precision):
        return torch.addmm(centres.square().sum(dim=1), features.to(centres.dtype), centres.T, alpha=-2)


def _fits(features: Tensor, centres: Tensor) -> bool:
    """Whether the cost is kept."""
    return len(features) * len(centres) * centres.dtype.itemsize <= COST_BYTES


def _block_rows(centres: Tensor) -> int:
    """Rows of the cost in a block."""
    return max(1, COST_BYTES // 16 // max(1, len(centres) * centres.dtype.itemsize))

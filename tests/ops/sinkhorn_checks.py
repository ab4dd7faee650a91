"""What every solver of Sinkhorn's iteration on a GPU must do, wherever its test runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.ops.sinkhorn import Sinkhorn, reference


def drawn_cost(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def check_solution(ours: Sinkhorn, cost: Tensor, reg: float, **options: Any) -> None:
    """Potentials err at most twice as much as the reference's in float32; the iterations are the same."""
    exact, plain = reference(cost.double(), reg, **options), reference(cost, reg, **options)
    assert torch.equal(ours.iterations, exact.iterations)
    for name in ("log_u", "log_v", "error"):
        found, expected, truth = (getattr(result, name) for result in (ours, plain, exact))
        assert found.dtype == torch.float32 and found.shape == truth.shape
        finite = truth.isfinite()
        assert torch.equal(found.isfinite(), finite)
        if finite.any():
            budget = 2 * (expected.double() - truth)[finite].abs().max() + 2e-6 * truth[finite].abs().max() + 1e-6
            assert (found.double() - truth)[finite].abs().max() <= budget, name

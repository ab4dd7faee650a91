"""From a feature map to one vector."""

from __future__ import annotations

from torch import Tensor, nn


class GeM(nn.Module):
    """Generalised mean over all positions, `(mean(x^p) + 1e-12)^(1/p)` with fixed p = 3 (SALCR, implementation details)."""

    power = 3.0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, H, W]`, not negative -> `[B, D]` float32."""
        return (x.float().pow(self.power).mean((2, 3)) + 1e-12).pow(1 / self.power)

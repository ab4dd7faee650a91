"""Cross entropy of features against a bank of cluster prototypes."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.neighbor_contrast import neighbor_contrast


def cluster_contrast(
    features: Tensor, bank: Tensor, labels: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and, when asked for, their gradients [..., B, D], float32: the label is the only positive."""
    return neighbor_contrast(features, bank, labels.unsqueeze(-1), temperature, with_gradient, precision)

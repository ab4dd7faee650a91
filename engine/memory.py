"""Memory banks: cluster prototypes that features are contrasted against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import ops


def cluster_memory(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """`[count, D]` L2-normalised mean feature of every cluster.

    Args:
        features: `[N, D]`; labels: `[N]` int64, -1 = in no cluster.
    """
    return F.normalize(ops.segment_mean(features, labels, count))


@torch.no_grad()
def update(bank: Tensor, features: Tensor, labels: Tensor, momentum: float, generator: torch.Generator | None) -> None:
    """`bank[y] <- normalize(momentum bank[y] + (1 - momentum) f)`, row after row, in place (SALCR Eq. 3).

    Args:
        bank: `[C, D]`.
        features: `[B, D]` unit rows.
        labels: `[B]` int64, -1 = no update.
        generator: draws the order of the rows; None = as they stand.
    """
    if generator is not None:
        order = torch.randperm(len(labels), generator=generator).to(labels.device, non_blocking=True)
        features, labels = features[order], labels[order]
    ops.memory_update_(bank, features.to(bank.dtype), labels, momentum)

"""BatchNorm over groups of images: one meaning of the batch, whatever the number of devices."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _GroupStatistics:
    """Normalises `groups` equal runs of consecutive rows, each with its own batch statistics.

    Running statistics take one step of `momentum` towards each group's in turn.
    """

    groups: int = 1

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward  # type: ignore[misc]
        if not self.training or self.groups == 1:  # type: ignore[attr-defined]
            return plain(x)
        return torch.cat([plain(part) for part in x.chunk(self.groups)])


class BatchNorm1d(_GroupStatistics, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with statistics per group."""


class BatchNorm2d(_GroupStatistics, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with statistics per group."""


def set_groups(network: nn.Module, groups: int) -> None:
    """Split the rows of every batch into `groups` equal groups in all BatchNorm layers of `network`."""
    for layer in network.modules():
        if isinstance(layer, _GroupStatistics):
            layer.groups = groups

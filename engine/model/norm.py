"""BatchNorm over groups of images: one meaning of the batch, whatever the number of devices.

A batch may be computed in slices, which have the same part of each kind of image (`engine.slices`). A group lies within a
slice, or is spread over those of several processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from engine import distributed


class GroupedBatchNorm(_BatchNorm):
    """Normalises `groups` equal runs of consecutive rows, each with its own batch statistics.

    Running statistics take one step of `momentum` towards each group's in turn.

    Attributes:
        span: processes that the rows of a group are spread over.
        seen: `[groups, 2, C]` means and variances of every call, where the running ones wait for `settle`; else None.
    """

    groups: int = 1
    span: int = 1
    seen: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward
        if not self.training:
            return plain(x)
        if self.seen is None:
            return plain(x) if self.groups == 1 else torch.cat([plain(part) for part in x.chunk(self.groups)])
        if self.span > 1:
            y, statistics = _Spread.apply(x, self.weight, self.bias, self.eps, self.span)
            self.seen.append(statistics)
            return y
        statistics = self.weight.new_zeros(self.groups, 2, x.shape[1])
        self.seen.append(statistics)
        # With a momentum of 1, a group's own statistics are the running ones.
        runs = zip(x.chunk(self.groups), statistics, strict=True)
        settings = (self.weight, self.bias, True, 1.0, self.eps)
        return torch.cat([F.batch_norm(part, mean, variance, *settings) for part, (mean, variance) in runs])


class BatchNorm1d(GroupedBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with statistics per group."""


class BatchNorm2d(GroupedBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with statistics per group."""


def layers(network: nn.Module) -> list[GroupedBatchNorm]:
    """The BatchNorm layers of `network` that have groups."""
    return [layer for layer in network.modules() if isinstance(layer, GroupedBatchNorm)]


def set_groups(found: Iterable[GroupedBatchNorm], groups: int, span: int = 1) -> None:
    """Let each layer split its rows into `groups`, which are spread over `span` processes."""
    for layer in found:
        layer.groups, layer.span = groups, span


def wait(found: Iterable[GroupedBatchNorm]) -> None:
    """From here on running statistics stay, until `settle`."""
    for layer in found:
        layer.seen = []


@torch.no_grad()
def settle(found: Iterable[GroupedBatchNorm], parts: int) -> None:
    """Move the running statistics as one process does that sees the batch at once: call after call, group after group.

    Args:
        found: layers that wait, all processes' alike.
        parts: slices that each of them has seen since, one after the other.
    """
    found = [layer for layer in found if layer.seen]
    if not found:
        return
    own = torch.cat([torch.stack(layer.seen).flatten() for layer in found if layer.seen])
    # Processes that share a group know the same of it.
    everyone = distributed.gather_equal(own)[:: found[0].span]
    lengths = [len(layer.seen or ()) * layer.groups * 2 * layer.num_features for layer in found]
    for layer, statistics in zip(found, everyone.split(lengths, dim=1), strict=True):
        calls = statistics.view(len(everyone), parts, -1, layer.groups, 2, layer.num_features)
        means, variances = calls.permute(4, 2, 0, 1, 3, 5).flatten(1, 4)
        momentum, count = layer.momentum or 0.0, len(means)
        weights = momentum * (1 - momentum) ** torch.arange(count - 1, -1, -1, device=means.device, dtype=means.dtype)
        assert (
            layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None
        )
        layer.running_mean.mul_((1 - momentum) ** count).add_(weights @ means)
        layer.running_var.mul_((1 - momentum) ** count).add_(weights @ variances)
        layer.num_batches_tracked += count
        layer.seen = []


class _Spread(torch.autograd.Function):
    """BatchNorm of rows that are spread over processes, and the `[1, 2, C]` mean and unbiased variance of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, span: int) -> tuple[Tensor, Tensor]:
        ctx.group = distributed.neighbours(span)
        rows = x.to(weight.dtype)
        variance, mean = torch.var_mean(rows, _all_but_channels(x), correction=0)
        own = torch.stack([mean, variance, torch.full_like(mean, x.numel() / x.shape[1])])
        means, variances, counts = distributed.gather_equal(own, ctx.group).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        statistics = torch.stack([mean, variance * total / (total - 1)]).unsqueeze(0)
        ctx.mark_non_differentiable(statistics)
        y = (rows - _beside(mean, x)) * _beside(scale * weight, x) + _beside(bias, x)
        return y.to(x.dtype), statistics

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        normal = (x.to(weight.dtype) - _beside(mean, x)) * _beside(scale, x)
        own = torch.stack([(gradient * normal).sum(_all_but_channels(x)), gradient.sum(_all_but_channels(x))])
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.group)
        along, level = sums / total
        found = (gradient - normal * _beside(along, x) - _beside(level, x)) * _beside(weight * scale, x)
        return found.to(x.dtype), own[0], own[1], None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _beside(column: Tensor, x: Tensor) -> Tensor:
    """`[C]` in the shape of `x` `[B, C, ...]`."""
    return column.view(1, -1, *[1] * (x.dim() - 2))

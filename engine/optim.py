"""The optimiser and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine import config
from engine.errors import UserError


def build(network: nn.Module, settings: config.Optim) -> torch.optim.Optimizer:
    """The optimiser over the parameters that learn.

    Each of its groups has a `scale`, which its learning rate is multiplied by. With `layer_decay` below 1 there is a group
    per depth, as `network.layers_above(name)` tells: the number of layers between a parameter and the features.

    Raises:
        UserError: layers are to differ, and the network does not tell them.
    """
    if settings.layer_decay < 1 and not hasattr(network, "layers_above"):
        raise UserError(
            f"optim.layer_decay: {type(network).__name__} has no layers_above(name), which tells how many layers lie between "
            "a parameter and the features; add it, or set optim.layer_decay=1"
        )
    learning = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    depths: dict[int, list[nn.Parameter]] = {}
    for name, parameter in learning:
        above = network.layers_above(name) if settings.layer_decay < 1 else 0  # type: ignore[operator]
        depths.setdefault(above, []).append(parameter)
    groups = [{"params": depths[above], "scale": settings.layer_decay**above} for above in sorted(depths)]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.kind]
    return kind(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def learning_rate(settings: config.Optim, epoch: int, epochs: int) -> float:
    """The rate in one epoch of a stage of `epochs`: times `factor` for every drop that lies behind, or on half a cosine."""
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    passed = sum(epoch >= drop * epochs for drop in settings.drops)
    return settings.lr * settings.factor**passed


def set_rate(optimizer: torch.optim.Optimizer, settings: config.Optim, rate: float, iteration: int) -> None:
    """Give every group its rate in the stage's `iteration`: it grows linearly over the first `warm_up` ones."""
    warm = min(1.0, (iteration + 1) / settings.warm_up) if settings.warm_up else 1.0
    for group in optimizer.param_groups:
        group["lr"] = rate * warm * group["scale"]


def clip(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Scale the gradient down to the norm `limit` where it is longer."""
    nn.utils.clip_grad_norm_([item for group in optimizer.param_groups for item in group["params"]], limit)

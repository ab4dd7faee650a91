"""Adam and its schedule."""

from __future__ import annotations

import torch
from torch import nn

from engine import config


def build(network: nn.Module, settings: config.Optim) -> torch.optim.Optimizer:
    """Adam over the parameters that learn."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def learning_rate(settings: config.Optim, epoch: int, epochs: int) -> float:
    """The rate in one epoch of a stage of `epochs`: times `factor` for every drop that lies behind."""
    passed = sum(epoch >= drop * epochs for drop in settings.drops)
    return settings.lr * settings.factor**passed

"""The dtype in which operators accumulate, whatever the dtype of their inputs and whatever autocast is on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any of `tensors` is, else float32: half types are too short for sums over a feature or a bank."""
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside the block autocast does not turn matrix products into half-precision ones."""
    return torch.autocast(device.type, enabled=False)

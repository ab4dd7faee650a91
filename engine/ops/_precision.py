"""In which precision operators compute, whatever the dtype of their inputs, autocast and `torch.backends` say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.ops import _check

PRECISIONS = ("ieee", "fast")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any of `tensors` is, else float32: half types are too short for sums over a feature or a bank."""
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def check_precision(precision: str) -> None:
    """Check the argument `precision` of operators that multiply matrices."""
    _check.choice("precision", precision, PRECISIONS)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside the block autocast does not turn matrix products into half-precision ones."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def products(device: torch.device, precision: str) -> Iterator[None]:
    """Inside the block torch multiplies float32 matrices in float32, or, where "fast" asks a GPU for it, in TF32."""
    on_gpu = device.type == "cuda"
    setting: Any = torch.backends.cuda.matmul if on_gpu else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if on_gpu and precision == "fast" else "ieee"
    try:
        with no_autocast(device):
            yield
    finally:
        setting.fp32_precision = before

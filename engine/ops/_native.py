"""Handing tensors to the functions of engine._C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""The numbers of csrc/rows.h."""


def function(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The form of a native function that computes in `dtype`, float32 or float64."""
    from engine import _C

    return getattr(_C, f"{name}_{str(dtype).removeprefix('torch.')}")


def address(values: Tensor) -> tuple[int]:
    """Of a contiguous tensor, which must outlive the call."""
    assert values.is_contiguous()
    return (values.data_ptr(),)


def rows(matrix: Tensor) -> tuple[int, int]:
    """Address and storage of a contiguous matrix of any float dtype, which must outlive the call."""
    assert matrix.is_contiguous()
    return matrix.data_ptr(), STORAGES[matrix.dtype]

"""Checks of operator arguments, made once, before a back end is picked."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def debug() -> bool:
    """True under `ENGINE_DEBUG=1`: checks that need a device synchronisation run too."""
    return os.environ.get("ENGINE_DEBUG", "0") == "1"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{layout}{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def fail(name: str, expected: str, value: object) -> ValueError:
    """The error of every check: `<argument> must be <what>, got <what it was>`."""
    return ValueError(f"{name} must be {expected}, got {_describe(value)}")


def tensor(name: str, value: object, shape: str, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """Check the type, the rank (letters of `shape`, e.g. "B D" or, with any leading dimensions, "... B D") and the dtype.

    Raises:
        TypeError: not a tensor.
        ValueError: another rank or dtype.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [{shape.replace(' ', ', ')}], got {type(value).__name__}")
    own = shape.removeprefix("... ").split()
    fits = value.dim() >= len(own) if shape.startswith("...") else value.dim() == len(own)
    if value.layout != torch.strided or not fits:
        raise fail(name, f"a dense tensor of shape [{shape.replace(' ', ', ')}]", value)
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise fail(name, f"of dtype {names}", value)
    return value


def size(name: str, value: Tensor, dim: int, expected: int, of: str) -> None:
    """Check that one dimension, counted from either end, has the size that another argument gives it."""
    if value.shape[dim] != expected:
        raise fail(name, f"of size {expected} in dimension {dim % value.dim()} ({of})", value)


def leading(name: str, value: Tensor, own: int, expected: torch.Size, other_name: str) -> None:
    """Check that the dimensions before the last `own` are those of another argument: one problem for each."""
    if value.shape[:-own] != expected:
        raise fail(name, f"of leading dimensions {list(expected)} like {other_name}", value)


def per_row(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check one value `[..., B]` for each row of `other` `[..., B, D]`, or `[B]` for those of every problem."""
    if value.dim() > 1:
        leading(name, value, 1, other.shape[:-2], other_name)
    like(name, value, other_name, other, dtype=False)
    size(name, value, -1, other.shape[-2], f"the rows of {other_name}")


def like(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Check that two arguments share their device and, by default, their dtype."""
    if value.device != other.device:
        raise fail(name, f"on {other.device} like {other_name}", value)
    if dtype and value.dtype != other.dtype:
        raise fail(name, f"{str(other.dtype).removeprefix('torch.')} like {other_name}", value)


def constant(name: str, value: Tensor) -> None:
    """Check that no gradient is asked of an argument that gets none."""
    if value.requires_grad and torch.is_grad_enabled():
        raise fail(name, "a constant, as no gradient to it is computed: pass it detached", value)


def indices(name: str, value: object, shape: str) -> Tensor:
    """Check an int64 tensor of labels or indices."""
    return tensor(name, value, shape, (torch.int64,))


def positive(name: str, value: float) -> None:
    """Check a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise fail(name, "a finite number above 0", value)


def count(name: str, value: int, low: int = 0) -> int:
    """An integer of at least `low`; numpy's, which label arrays give, becomes Python's."""
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise fail(name, f"an integer of at least {low}", value)
    return value


def choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check a string that is one of `choices`."""
    if value not in choices:
        raise fail(name, "one of " + ", ".join(repr(option) for option in choices), value)


def in_range(name: str, value: Tensor, high: int, low: int = -1) -> None:
    """Under `ENGINE_DEBUG=1` only: every label or index lies in [low, high)."""
    if debug() and value.numel():
        least, most = int(value.min()), int(value.max())
        if least < low or most >= high:
            raise ValueError(f"{name} must be in [{low}, {high}), got values from {least} to {most}")


def csr(name: str, value: object, shape: str) -> Tensor:
    """Check a `torch.sparse_csr` matrix of a floating dtype with int64 indices and arrays of fitting lengths.

    What its indices hold is checked under `ENGINE_DEBUG=1`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a sparse CSR tensor [{shape.replace(' ', ', ')}], got {type(value).__name__}")
    if value.layout != torch.sparse_csr or value.dim() != 2:
        raise fail(name, f"a torch.sparse_csr tensor of shape [{shape.replace(' ', ', ')}]", value)
    if value.dtype not in FLOATS:
        raise fail(name, "of a floating dtype", value)
    starts, columns, values = value.crow_indices(), value.col_indices(), value.values()
    indices(f"the row bounds of {name}", starts, "rows+1")
    size(f"the row bounds of {name}", starts, 0, value.shape[0] + 1, "its rows and one")
    indices(f"the columns of {name}", columns, "entries")
    size(f"the values of {name}", values, 0, len(columns), "its columns")
    in_range(f"the row bounds of {name}", starts, len(columns) + 1, low=0)
    in_range(f"the columns of {name}", columns, value.shape[1], low=0)
    return value


def no_nan(name: str, value: Tensor) -> None:
    """Under `ENGINE_DEBUG=1` only: no entry is NaN."""
    if debug() and (nan_count := int(value.isnan().sum())):
        raise ValueError(f"{name} must be without NaN, got {nan_count} of {value.numel()} entries")

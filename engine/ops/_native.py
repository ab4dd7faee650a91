"""Handing tensors to the functions of engine._C."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""The numbers of csrc/rows.h."""


PACKAGE = Path(__file__).parents[1]


@cache
def stale() -> bool:
    """Whether engine._C, which takes addresses on trust, was built from other sources than those in the checkout it is of.

    Raises:
        ImportError: engine._C is not built.
    """
    from engine import _C

    folder = PACKAGE.parent / "csrc"
    if (PACKAGE / "csrc").is_dir() or not folder.is_dir():  # a package, which was built as a whole
        return False
    files = sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cpp", ".cu"))
    lines = (f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files)
    # Those built before this was looked at have no such function.
    return hashlib.sha256("".join(lines).encode()).hexdigest() != getattr(_C, "sources", str)()


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

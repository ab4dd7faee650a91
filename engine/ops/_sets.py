"""Padded index sets: int64 rows that hold each index once, ascending, then -1."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check

PADDING = torch.iinfo(torch.int64).max
"""Stands for -1 while rows are sorted, so that padding comes last."""


def check(a: Tensor, b: Tensor) -> None:
    """Check two padded index sets with the same rows."""
    _check.indices("a", a, "B P")
    _check.indices("b", b, "B Q")
    _check.like("b", b, "a", a)
    _check.size("b", b, 0, a.shape[0], "the rows of a")


def ascending(rows: Tensor) -> Tensor:
    """Rows in any order, with padding and repeats anywhere -> each index once, ascending, `PADDING` last."""
    rows = torch.where(rows < 0, PADDING, rows).sort(dim=1).values
    repeated = torch.zeros_like(rows, dtype=torch.bool)
    repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]
    return rows.masked_fill(repeated, PADDING).sort(dim=1).values


def padded(rows: Tensor) -> Tensor:
    """`PADDING` back to -1."""
    return rows.masked_fill(rows == PADDING, -1)

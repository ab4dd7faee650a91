"""Padded index sets: int64 rows that hold each index once, ascending, then -1."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check

SIGN = torch.iinfo(torch.int64).min
"""The sign bit, flipped while rows are sorted: indices stay in order, and -1 comes last."""
PADDING = -1 ^ SIGN
SHARED_BYTES = 48 << 10
"""Of a block on any GPU."""


def check(a: Tensor, b: Tensor) -> None:
    """Check two padded index sets with the same rows."""
    _check.indices("a", a, "B P")
    _check.indices("b", b, "B Q")
    _check.like("b", b, "a", a)
    _check.size("b", b, 0, a.shape[0], "the rows of a")


def ascending(rows: Tensor) -> Tensor:
    """Rows in any order, with padding and repeats anywhere -> each index once, ascending, padding last; signs flipped."""
    rows = torch.where(rows < 0, -1, rows).bitwise_xor(SIGN).sort(dim=1).values
    repeated = torch.zeros_like(rows, dtype=torch.bool)
    repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]
    return rows.masked_fill(repeated, PADDING).sort(dim=1).values


def padded(rows: Tensor) -> Tensor:
    """Rows of `ascending` with their signs flipped back."""
    return rows.bitwise_xor(SIGN)


def room(rows: int, entries: int, like: Tensor) -> tuple[Tensor | None, int]:
    """Where csrc/warp_sets.h sorts `entries` of each row: memory of its own, or bytes of shared memory of a block."""
    if 8 * entries <= SHARED_BYTES:
        return None, 8 * entries
    return like.new_empty(rows, entries), 0

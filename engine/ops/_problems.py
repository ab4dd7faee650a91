"""Batches of problems: what comes before the last dimensions of an operator's arguments counts problems."""

from __future__ import annotations

from math import prod

from torch import Tensor


def each(value: Tensor, own: int) -> list[Tensor]:
    """What every problem has of a batch, as views; the last `own` dimensions are its own."""
    if value.dim() == own:
        return [value]
    return [problem for part in value.unbind() for problem in each(part, own)]


def merge(matrices: Tensor) -> Tensor:
    """[P, rows, columns], of P problems without other leading dimensions; a view where that can be."""
    return matrices.reshape(prod(matrices.shape[:-2]), *matrices.shape[-2:])


def for_rows(value: Tensor, rows: Tensor) -> Tensor:
    """One value `[..., B]` for each of `rows` `[..., B, D]`, given so or as `[B]` for all problems."""
    return value if value.dim() == rows.dim() - 1 else value.expand(rows.shape[:-1])

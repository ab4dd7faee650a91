"""Batches of problems: what comes before the last dimensions of an operator's arguments counts problems."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

from torch import Tensor


def places(matrices: Tensor) -> Iterator[tuple[int, ...]]:
    """The index of each matrix of `[..., rows, columns]`: () alone where there is one without leading dimensions."""
    return product(*map(range, matrices.shape[:-2]))


def merge(value: Tensor, own: int) -> Tensor:
    """With one leading dimension, of all problems, before its `own` last ones; a view where that can be."""
    leading = value.dim() - own
    return value.reshape(prod(value.shape[:leading]), *value.shape[leading:])

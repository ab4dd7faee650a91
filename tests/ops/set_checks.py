"""Padded index sets in any order, for the tests of the set operators."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

MAX_WIDTH = 6


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two tensors [B, P] and [B, Q] with entries from -1 to 7, repeats and padding anywhere."""
    row_count = draw(st.integers(0, 4))

    def rows() -> Tensor:
        width = draw(st.integers(0, MAX_WIDTH))
        row = st.lists(st.integers(-1, 7), min_size=width, max_size=width)
        values = draw(st.lists(row, min_size=row_count, max_size=row_count))
        return torch.tensor(values, dtype=torch.int64).reshape(row_count, width)

    return rows(), rows()


def as_sets(rows: Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in rows.tolist()]


def as_rows(sets: list[set[int]], width: int) -> list[list[int]]:
    return [sorted(row) + [-1] * (width - len(row)) for row in sets]

"""Padded index sets in any order, for the tests of the set operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulated import cuda_backend
from graph_checks import same_bits_for_any_thread_count
from hypothesis import strategies as st
from torch import Tensor

from engine.ops import _sets, use_backend

MAX_WIDTH = 40
BACKENDS = ("cpu", "reference")
ENTRIES = st.integers(-1, 7) | st.integers(-1, 60) | st.sampled_from([-(2**63), -2, 2**62, 2**63 - 1])


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two tensors [B, P] and [B, Q] of any int64, repeats and padding anywhere."""
    row_count = draw(st.integers(0, 4))

    def rows() -> Tensor:
        width = draw(st.integers(0, MAX_WIDTH))
        row = st.lists(ENTRIES, min_size=width, max_size=width)
        values = draw(st.lists(row, min_size=row_count, max_size=row_count))
        return torch.tensor(values, dtype=torch.int64).reshape(row_count, width)

    return rows(), rows()


def as_sets(rows: Tensor) -> list[set[int]]:
    return [{entry for entry in row if entry >= 0} for row in rows.tolist()]


def as_rows(sets: list[set[int]], width: int) -> list[list[int]]:
    return [sorted(row) + [-1] * (width - len(row)) for row in sets]


def check_layout_and_threads(operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Sets in any layout, in more blocks than there are threads."""
    a, b = torch.randint(-1, 60, (2, 400, 30), generator=torch.Generator().manual_seed(1))
    with use_backend("reference"):
        expected = operator(a, b)
    strided = a.T.contiguous().T, torch.stack([b, b], dim=2)[:, :, 1]
    with use_backend("cpu"):
        same_bits_for_any_thread_count(lambda: [operator(a, b)])
        for sets in ((a, b), strided):
            assert torch.equal(operator(*sets), expected)


def check_rows_beyond_shared_memory(operator: Callable[[Tensor, Tensor], Tensor], patch: pytest.MonkeyPatch) -> None:
    """On the emulator: rows that a block has no shared memory for."""
    patch.setattr(_sets, "SHARED_BYTES", 100)
    a, b = torch.randint(-1, 60, (2, 20, 37), generator=torch.Generator().manual_seed(1))
    with use_backend("reference"):
        expected = operator(a, b)
    with cuda_backend():
        assert torch.equal(operator(a, b), expected)

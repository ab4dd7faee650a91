"""Making and reading `torch.sparse_csr` matrices."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def build(row_counts: Tensor, columns: Tensor, values: Tensor, column_count: int) -> Tensor:
    """The CSR matrix whose row i holds the next `row_counts[i]` of `columns` (ascending in a row) and `values`."""
    return from_starts(starts_of(row_counts), columns, values, column_count)


def starts_of(row_counts: Tensor) -> Tensor:
    """Where rows of so many entries begin, and the end of the last, `[rows + 1]` int64."""
    return torch.cat([row_counts.new_zeros(1, dtype=torch.int64), row_counts.cumsum(0)])


def from_starts(starts: Tensor, columns: Tensor, values: Tensor, column_count: int) -> Tensor:
    """The CSR matrix whose row i holds the entries from `starts[i]` to `starts[i + 1]`."""
    size = (len(starts) - 1, column_count)
    with warnings.catch_warnings():
        # torch announces the beta state of CSR tensors at the first one: nothing a user of an operator can act on.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


def row_counts(csr: Tensor) -> Tensor:
    """How many entries each row stores, `[rows]` int64."""
    return csr.crow_indices().diff()


def bounded_starts(csr: Tensor) -> Tensor:
    """The row bounds `[rows + 1]` int64 of a matrix that may come from anywhere: none lies outside its entries."""
    return csr.crow_indices().clamp(0, len(csr.col_indices()))


def inside(csr: Tensor) -> Tensor:
    """A matrix for torch, which reads whatever indices name: `csr`, or what it holds without entries outside of it."""
    starts, columns = bounded_starts(csr), csr.col_indices()
    counts = starts.diff()
    kept = (columns >= 0) & (columns < csr.shape[1])
    if bool(kept.all()) and bool((counts >= 0).all()) and torch.equal(starts, csr.crow_indices()):
        return csr
    rows, entries = expand(starts[:-1], counts.clamp_min(0))
    rows, entries = rows[kept[entries]], entries[kept[entries]]
    row_counts = rows.bincount(minlength=csr.shape[0])
    return build(row_counts, columns[entries], csr.values()[entries], csr.shape[1])


def row_indices(csr: Tensor) -> Tensor:
    """The row of every stored entry, `[entries]` int64."""
    rows = torch.arange(csr.shape[0], device=csr.device)
    return rows.repeat_interleave(row_counts(csr), output_size=csr.values().numel())


def expand(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Enumerate segments of a flat array, one after the other.

    Args:
        starts, lengths: `[S]` int64, segment s is `starts[s], starts[s] + 1, ...`.

    Returns:
        (segment, position), `[sum of lengths]` int64: whose element it is, and where it lies.
    """
    ends = lengths.cumsum(0)
    segment = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    position = torch.arange(len(segment), device=lengths.device) + (starts - ends + lengths)[segment]
    return segment, position

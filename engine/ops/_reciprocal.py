"""k-reciprocal sets and their overlaps in plain torch: for the reference of `jaccard`, and for re-ranking.

A set of pairs of rows is a sorted tensor of keys `row * N + column`; weights are CSR matrices in fixed point.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from engine.ops import _csr

ONE = 1 << 48
"""Weight 1 in fixed point. Sums of integers are exact: the same bits in any order, so symmetric and deterministic."""
BLOCK_ENTRIES = 1 << 22
"""Products, and entries of the dense row block that collects them, held at a time: 32 MB each."""

Entries: TypeAlias = tuple[int, Tensor, Tensor, Tensor]
"""Sparse content of some rows, row by row: number of rows; row within them, column and value of every entry."""


def reciprocal(rank: Tensor) -> Tensor:
    """Keys of the pairs that are in each other's list, ascending."""
    count = len(rank)
    own = torch.arange(count, device=rank.device).unsqueeze(1)
    forward, backward = (own * count + rank).flatten(), (rank * count + own).flatten()
    return forward[torch.isin(forward, backward)].sort().values


def expanded(near: Tensor, half: Tensor, count: int) -> Tensor:
    """Keys of R*, ascending: `near` = keys of R(., k1), `half` = keys of R(., round(k1 / 2) + 1)."""
    half_counts = torch.bincount(half // count, minlength=count)
    half_starts = half_counts.cumsum(0) - half_counts
    candidates = near % count
    candidate_sizes = half_counts[candidates]
    source, position = _csr.expand(half_starts[candidates], candidate_sizes)
    keys = (near - candidates)[source] + (half % count)[position]
    inside = near[torch.searchsorted(near, keys).clamp(max=len(near) - 1)] == keys
    shared = torch.bincount(source[inside], minlength=len(near))
    accepted = 3 * shared > 2 * candidate_sizes
    return torch.cat([near, keys[accepted[source]]]).unique()


def query_expansion(weights: Tensor, rank: Tensor) -> Tensor:
    """Sums of the rows of `weights` listed in `rank`, CSR in fixed point (not divided by their number)."""
    count, k = rank.shape
    chosen = rank.sort(dim=1).values.flatten()
    graph = _csr.build(rank.new_full((count,), k), chosen, torch.full_like(chosen, ONE), count)  # min(ONE, w) = w
    return stack((entries_of(sums) for _, sums in min_products(graph, weights)), count)


def entries_of(block: Tensor) -> Entries:
    """What is not 0 in a dense block."""
    flat, width = block.flatten(), block.shape[1]
    where = flat.nonzero().squeeze(1)
    return len(block), where // width, where % width, flat[where]


def stack(blocks: Iterable[Entries], column_count: int) -> Tensor:
    """The CSR matrix of blocks of rows, in order."""
    parts = [(torch.bincount(row, minlength=row_count), *entries) for row_count, row, *entries in blocks]
    row_counts, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return _csr.build(row_counts, columns, values, column_count)


def min_products(left: Tensor, right: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`sum_j min(left_ij, right_jl)` of two CSR matrices of integers: (first row, dense block of rows), in order.

    A block lies in memory that the next one takes over.
    """
    columns, values, width = left.col_indices(), left.values(), right.shape[1]
    starts, lengths = right.crow_indices()[columns], _csr.row_counts(right)[columns]
    row = _csr.row_indices(left)
    entry_bounds = left.crow_indices().tolist()
    products = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    product_bounds = products[left.crow_indices()].tolist()
    buffer = values.new_empty(max(BLOCK_ENTRIES, width))
    first = 0
    while first < left.shape[0]:
        last = bisect_right(product_bounds, product_bounds[first] + BLOCK_ENTRIES) - 1
        last = max(first + 1, min(last, first + BLOCK_ENTRIES // width))
        entries = slice(entry_bounds[first], entry_bounds[last])
        source, position = _csr.expand(starts[entries], lengths[entries])
        target = ((row[entries] - first) * width)[source] + right.col_indices()[position]
        smaller = torch.minimum(values[entries][source], right.values()[position])
        sums = buffer[: (last - first) * width].zero_().index_add_(0, target, smaller)
        yield first, sums.view(last - first, width)
        first = last

"""The k nearest rows of a bank by inner product."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import distributed
from engine.ops import _check, _cuda, _native
from engine.ops._backend import pick
from engine.ops._neighbors import largest
from engine.ops._precision import accumulation_dtype, check_precision, products
from engine.ops._problems import each

BLOCK_ENTRIES = 1 << 23
"""Similarities held at a time by the reference: 32 MB of float32."""
GPU_BLOCK_ROWS = 1 << 12
"""Queries whose similarities the GPU computes at a time: with as many rows of the bank, 64 MB."""
GPU_MOST = 1 << 11
"""Neighbours of a query that a block of threads has shared memory for."""


@torch.no_grad()
def topk(
    queries: Tensor, bank: Tensor, k: int, *, exclude_self: bool = False, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """The `k` largest inner products of every query with the rows of a bank, exact, without the [B, N] matrix.

    Args:
        queries: `[..., B, D]` float32, float16, bfloat16 or float64; no gradient is computed. The dimensions before the
            last two, if any, count problems, each with its bank.
        bank: `[..., N, D]`, likewise.
        k: how many; beyond the rows there are, the result is padded.
        exclude_self: row i of the bank is query i itself (B = N) and is no neighbour of it.
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        values `[..., B, k]` in the inputs' common dtype and indices `[..., B, k]` int64, ordered by (similarity
        descending, index ascending) as compared before rounding to a half type, padded with -inf and -1. NaN counts as
        the largest similarity, as in `torch.topk`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> values, indices = ops.topk(bank, bank, k=2, exclude_self=True)
        >>> indices
        tensor([[1, 2],
                [0, 2],
                [1, 0]])
    """
    _check.tensor("queries", queries, "... B D")
    _check.tensor("bank", bank, "... N D")
    _check.leading("bank", bank, 2, queries.shape[:-2], "queries")
    _check.like("bank", bank, "queries", queries, dtype=False)
    _check.size("bank", bank, -1, queries.shape[-1], "the width of queries")
    k = _check.count("k", k)
    check_precision(precision)
    if exclude_self:
        _check.size("queries", queries, -2, bank.shape[-2], "the rows of bank, as exclude_self is set")
    search, options = pick("topk", queries, bank), {"exclude_self": exclude_self, "precision": precision}
    if queries.dim() == 2 and distributed.is_sharing() and not exclude_self:
        runs = distributed.shares(len(queries))
        values, indices = search(queries[runs[distributed.rank()]], bank, k, **options)
        return distributed.gather_shares(values, runs), distributed.gather_shares(indices, runs)
    if queries.dim() == 2:
        return search(queries, bank, k, **options)
    values = queries.new_empty(*queries.shape[:-1], k, dtype=torch.promote_types(queries.dtype, bank.dtype))
    indices = torch.empty_like(values, dtype=torch.int64)
    rows = each(queries, 2)
    others = rows if queries is bank else each(bank, 2)
    for *problem, own_values, own_indices in zip(rows, others, each(values, 2), each(indices, 2), strict=True):
        found = search(*problem, k, **options)
        own_values.copy_(found[0])
        own_indices.copy_(found[1])
    return values, indices


def reference(
    queries: Tensor, bank: Tensor, k: int, *, exclude_self: bool = False, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Of one problem: `torch.topk` of the similarities with a defined order among equals, in blocks of queries."""
    query_count, bank_count = queries.shape[0], bank.shape[0]
    dtype = accumulation_dtype(queries, bank)
    values = queries.new_full((query_count, k), -torch.inf, dtype=torch.promote_types(queries.dtype, bank.dtype))
    indices = torch.full_like(values, -1, dtype=torch.int64)
    found = min(k, bank_count - (1 if exclude_self else 0))
    if found <= 0 or query_count == 0:
        return values, indices
    columns = bank.to(dtype).T
    block_rows = max(1, BLOCK_ENTRIES // bank_count)
    for start in range(0, query_count, block_rows):
        rows = slice(start, start + block_rows)
        with products(queries.device, precision):
            similarity = queries[rows].to(dtype) @ columns
        if exclude_self:
            similarity.diagonal(offset=start).fill_(-torch.inf)
        best, where = largest(similarity, found)
        values[rows, :found] = best.to(values.dtype)
        indices[rows, :found] = where
    return values, indices


def cpu(
    queries: Tensor, bank: Tensor, k: int, *, exclude_self: bool = False, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """csrc/topk.cpp: products in blocks that stay in cache, each used for both of its rows where queries is bank."""
    dtype = accumulation_dtype(queries, bank)
    rows = queries.contiguous()
    others = rows if queries is bank else bank.contiguous()
    values = rows.new_empty(rows.shape[0], k, dtype=dtype)
    indices = torch.empty_like(values, dtype=torch.int64)
    _native.function("topk", dtype)(
        *_native.rows(rows),
        *_native.rows(others),
        rows.shape[0],
        others.shape[0],
        rows.shape[1],
        k,
        exclude_self,
        values.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
    )
    return values.to(torch.promote_types(queries.dtype, bank.dtype)), indices


def cuda(
    queries: Tensor, bank: Tensor, k: int, *, exclude_self: bool = False, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Products by torch in blocks, csrc/topk.cu keeps the best; each serves both of its rows where queries is bank."""
    query_count, bank_count = queries.shape[0], bank.shape[0]
    kept = min(k, bank_count)
    if kept > GPU_MOST or bank_count > 1 << 32:  # a candidate has 32 bits for the row of the bank
        return reference(queries, bank, k, exclude_self=exclude_self, precision=precision)
    nearest = torch.zeros(query_count, k, dtype=torch.int64, device=queries.device)
    symmetric = queries is bank

    def search(first_query: int, first_row: int) -> None:
        rows, others = queries[first_query:][:GPU_BLOCK_ROWS], bank[first_row:][:GPU_BLOCK_ROWS]
        with products(queries.device, precision):
            block = rows.float() @ others.float().T
        offer(block, first_query, first_row, nearest, kept, exclude_self)
        if symmetric and first_query != first_row:
            offer(block.T.contiguous(), first_row, first_query, nearest, kept, exclude_self)

    if kept > 0:
        for first_query in range(0, query_count, GPU_BLOCK_ROWS):
            for first_row in range(first_query if symmetric else 0, bank_count, GPU_BLOCK_ROWS):
                search(first_query, first_row)
    values, indices = found(nearest)
    return values.to(torch.promote_types(queries.dtype, bank.dtype)), indices


def offer(
    block: Tensor, first_query: int, first_row: int, nearest: Tensor, kept: int, exclude_self: bool = False
) -> None:
    """Show the similarities of some queries with some rows of a bank to the lists of these queries, on a GPU.

    Args:
        block: `[queries, rows]` float32, contiguous, of the queries from `first_query` on with the rows from
            `first_row` on.
        nearest: `[all queries, k]` int64, contiguous, a candidate of csrc/topk.cu each, or 0 for none. The first `kept`
            of each row become the best of those and of these.
        kept: from 1 to the smallest of k, the rows of the bank and `GPU_MOST`.
        exclude_self: row i of the bank is query i itself and is not taken.
    """
    arguments = block, block.shape[1], first_query, first_row, exclude_self, nearest.shape[1], kept, nearest
    _cuda.launch("topk", "topk_select_kernel", len(block), 256, arguments, shared_bytes=8 * (2 * kept + 1024))


def found(nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities, float32, and rows of the bank, in the memory of `nearest`, from candidates: -inf and -1 for none."""
    values = torch.empty_like(nearest, dtype=torch.float32)
    count = nearest.numel()
    _cuda.launch("topk", "topk_write_kernel", -(-count // 256), 256, (count, nearest, values))
    return values, nearest

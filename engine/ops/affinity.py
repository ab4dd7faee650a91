"""The k-nearest-neighbour graph with rows that sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check, _csr, _cuda
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, check_precision
from engine.ops.topk import GPU_MOST, topk

ROWS_PER_BLOCK = 8
"""Of a block of warps, on the GPU."""


@torch.no_grad()
def affinity(queries: Tensor, bank: Tensor, k: int, *, precision: str = "ieee") -> Tensor:
    """One block of the propagation graph: `A_ij = max(s_ij, 0) / sum` over the `k` largest `s_ij = q_i . b_j` of row i.

    SALCR (Cheng et al., IJCV 2025), the graph of Eq. 28. Of equal similarities at the k-th place the lower index is
    kept. A row without a positive similarity stores nothing.

    Args:
        queries: `[B, D]` float32, float16, bfloat16 or float64; no gradient is computed.
        bank: `[N, D]`, likewise.
        k: neighbours kept per row at most.
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        `[B, N]` `torch.sparse_csr`, columns ascending; float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> queries = torch.tensor([[1.0, 0.0]])
        >>> bank = torch.tensor([[0.6, 0.8], [0.2, 0.4], [-1.0, 0.0]])
        >>> ops.affinity(queries, bank, k=3).to_dense()  # what points away is no neighbour
        tensor([[0.7500, 0.2500, 0.0000]])
    """
    _check.tensor("queries", queries, "B D")
    _check.tensor("bank", bank, "N D")
    _check.like("bank", bank, "queries", queries, dtype=False)
    _check.size("bank", bank, 1, queries.shape[1], "the width of queries")
    _check.no_nan("queries", queries)
    _check.no_nan("bank", bank)
    k = _check.count("k", k)
    check_precision(precision)
    return pick("affinity", queries, bank)(queries, bank, k, precision=precision)


def reference(queries: Tensor, bank: Tensor, k: int, *, precision: str = "ieee") -> Tensor:
    """Neighbours from `topk`, sorted by column."""
    values, indices = topk(queries, bank, k, precision=precision)
    values = values.to(accumulation_dtype(values))
    bank_count = bank.shape[0]
    columns, order = indices.masked_fill(~(values > 0), bank_count).sort(dim=1)
    kept = columns < bank_count
    values = values.gather(1, order).masked_fill(~kept, 0)
    weights = values / values.sum(dim=1, keepdim=True)
    return _csr.build(kept.sum(dim=1), columns[kept], weights[kept], bank_count)


def cuda(queries: Tensor, bank: Tensor, k: int, *, precision: str = "ieee") -> Tensor:
    """csrc/affinity.cu, after the search: a warp per row. Waits for the device once, as CSR has no room to spare."""
    k = min(k, len(bank))
    if k > GPU_MOST:
        return reference(queries, bank, k, precision=precision)
    values, indices = topk(queries, bank, k, precision=precision)
    values = values.float()
    starts = _csr.starts_of((values > 0).sum(dim=1))
    columns = starts.new_empty(int(starts[-1]))
    weights = torch.empty_like(columns, dtype=torch.float32)
    arguments = values, indices, len(values), k, starts, columns, weights
    _cuda.launch("affinity", "affinity_write_kernel", -(-len(values) // ROWS_PER_BLOCK), 256, arguments)
    return _csr.from_starts(starts, columns, weights, len(bank))

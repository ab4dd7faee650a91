"""Features averaged over a graph."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from engine.ops import _check, _csr, _native
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, no_autocast

BLOCK_ENTRIES = 1 << 22
"""Features gathered at a time for the gradient of a graph: 16 MB of float32."""


def propagate(csr: Tensor, features: Tensor) -> Tensor:
    """`F'_i = sum_j A_ij F_j` with a sparse graph A: one block of SALCR (Cheng et al., IJCV 2025) Eq. 29.

    Args:
        csr: `[B, N]` `torch.sparse_csr` of a floating dtype; a gradient goes to its values.
        features: `[N, D]` float32, float16, bfloat16 or float64; a gradient goes here.

    Returns:
        `[B, D]` in the dtype of `features`; a row without an entry is zero.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> graph = torch.tensor([[0.75, 0.25], [0.0, 0.0]]).to_sparse_csr()
        >>> ops.propagate(graph, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0.7500, 0.2500],
                [0.0000, 0.0000]])
    """
    _check.csr("csr", csr, "B N")
    _check.tensor("features", features, "N D")
    _check.like("features", features, "csr", csr, dtype=False)
    _check.size("features", features, 0, csr.shape[1], "the columns of csr")
    return pick("propagate", features, csr)(csr, features)


def reference(csr: Tensor, features: Tensor) -> Tensor:
    """The sparse matrix product, in float32 at least."""
    dtype = accumulation_dtype(csr, features)
    with no_autocast(features.device):
        return (_csr.inside(csr).to(dtype) @ features.to(dtype)).to(features.dtype)


def cpu(csr: Tensor, features: Tensor) -> Tensor:
    """csrc/propagate.cpp: rows collect from a slice of the features that stays in cache."""
    return collect(csr, features, "cpu")


def collect(csr: Tensor, features: Tensor, backend: str) -> Tensor:
    """`propagate` by a back end's kernel, with gradients by the same kernel."""
    return _operator(_csr.bounded_starts(csr), csr.col_indices(), csr.values(), features, backend)


@torch.library.custom_op("engine::propagate", mutates_args=())
def _operator(starts: Tensor, columns: Tensor, values: Tensor, features: Tensor, backend: str) -> Tensor:
    dtype = accumulation_dtype(values, features)
    starts, columns, features = starts.contiguous(), columns.contiguous(), features.contiguous()
    result = features.new_zeros(len(starts) - 1, features.shape[1], dtype=dtype)
    run = _run_native if backend == "cpu" else import_module("engine.kernels.propagate").run
    run(starts, columns, values.to(dtype).contiguous(), features, result)
    return result.to(features.dtype)


def _run_native(starts: Tensor, columns: Tensor, values: Tensor, features: Tensor, result: Tensor) -> None:
    _native.function("propagate", result.dtype)(
        starts.data_ptr(),
        columns.data_ptr(),
        values.data_ptr(),
        result.shape[0],
        features.shape[0],
        *_native.rows(features),
        features.shape[1],
        result.data_ptr(),
        torch.get_num_threads(),
    )


@_operator.register_fake
def _(starts: Tensor, columns: Tensor, values: Tensor, features: Tensor, backend: str) -> Tensor:
    return features.new_empty(len(starts) - 1, features.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    starts, columns, values, features = ctx.saved_tensors
    place = torch.arange(len(columns), device=columns.device)
    rows = torch.searchsorted(starts, place, right=True) - 1
    stored = (rows >= 0) & (rows < len(starts) - 1) & (columns >= 0) & (columns < features.shape[0])
    rows = torch.where(stored, rows, 0)
    to_values = to_features = None
    if ctx.needs_input_grad[2]:
        products = _row_products(gradient, rows, features, torch.where(stored, columns, 0))
        to_values = torch.where(stored, products, 0).to(values.dtype)
    if ctx.needs_input_grad[3]:  # the product with the transposed graph
        columns, order = torch.where(stored, columns, features.shape[0]).sort(stable=True)
        bounds = torch.arange(features.shape[0] + 1, device=columns.device)
        turned = torch.searchsorted(columns, bounds), rows[order], values[order]
        to_features = _operator(*turned, gradient, ctx.backend)
    return None, None, to_values, to_features, None


_operator.register_autograd(_backward, setup_context=_keep_inputs)


def _row_products(one: Tensor, rows: Tensor, other: Tensor, other_rows: Tensor) -> Tensor:
    """The inner products of `one[rows]` with `other[other_rows]`, `[entries]`, in blocks."""
    if min(len(one), len(other)) == 0:
        return one.new_zeros(len(rows))  # there is no row to take
    dtype = accumulation_dtype(one, other)
    block = max(1, BLOCK_ENTRIES // max(1, one.shape[1]))
    pairs = zip(rows.split(block), other_rows.split(block), strict=True)
    return torch.cat([(one[left].to(dtype) * other[right].to(dtype)).sum(dim=1) for left, right in pairs])

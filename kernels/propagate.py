"""Features averaged over a graph."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.ops.propagate import collect

BLOCK_WIDTH = 512
"""Columns a program collects. Programs of one slice follow each other, so that its rows stay in the second-level cache."""


@triton.jit
def _collect_kernel(
    starts_p,
    columns_p,
    values_p,
    features_p,
    result_p,
    feature_count,
    entry_count,
    width,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_width = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    m_width = o_width < width
    first = tl.maximum(tl.load(starts_p + row), 0)
    last = tl.minimum(tl.load(starts_p + row + 1), entry_count)
    total = tl.zeros([BLOCK_WIDTH], dtype=tl.float32)
    for entry in range(first, last):
        column = tl.load(columns_p + entry).to(tl.int64)
        o_column = tl.full([BLOCK_WIDTH], column, tl.int64)
        m_inside = m_width & (o_column >= 0) & (o_column < feature_count)
        weight = tl.load(values_p + entry)
        b_features = tl.load(features_p + o_column * width + o_width, mask=m_inside, other=0.0)
        total += weight * b_features.to(tl.float32)
    tl.store(result_p + row * width + o_width, total, mask=m_width)


def propagate(csr: Tensor, features: Tensor) -> Tensor:
    """As engine/ops/propagate.py, by `run`."""
    return collect(csr, features, "triton")


def run(starts: Tensor, columns: Tensor, values: Tensor, features: Tensor, result: Tensor) -> None:
    """result[i] = the sum of values[e] * features[columns[e]] over the entries e from starts[i] to starts[i + 1]."""
    row_count, width = result.shape
    if row_count == 0 or width == 0:
        return
    _collect_kernel[(row_count, triton.cdiv(width, BLOCK_WIDTH))](
        starts,
        columns,
        values,
        features,
        result,
        features.shape[0],
        columns.shape[0],
        width,
        BLOCK_WIDTH=BLOCK_WIDTH,
        num_warps=4,
    )

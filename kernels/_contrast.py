"""What the losses against a memory bank share on the GPU.

The bank is taken in chunks that stay in the second-level cache while they are read twice; of a batch of problems, the
same chunk of each at once. Of a chunk,

1. `_score_kernel` computes tiles of scores s_ij = f_i . m_j / t, and per tile and row their maximum and the sum of
   e^(s - maximum); where a gradient is asked for it leaves e^(s - maximum) in a buffer [B, chunk];
2. `_merge_kernel` takes the tiles, in order, into the running maximum and sum of each row, and says by what each tile,
   and what was gathered before, is to be multiplied;
3. `_spread_kernel` adds (those terms) @ chunk to the gradient.

So a score is computed once, nothing of size [B, N] is stored, any temperature is safe, and every sum has one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops._backend import interpreted
from engine.ops._problems import merge

CHUNK_ROWS = 4096
"""Rows of the bank between two passes: 32 MB of float32 at a width of 2048."""

TILE_COLUMNS = 128
"""Rows of the bank in a tile of scores: a divisor of CHUNK_ROWS."""

BLOCK_ROWS = 64
"""Features in a tile: with three TF32 products for one of float32, 128 would not fit into the registers."""


@triton.jit
def _score_kernel(
    features_p,
    bank_p,
    weights_p,
    terms_p,
    largest_p,
    sums_p,
    products_p,
    row_count,
    bank_count,
    width,
    bank_stride,
    first,
    inverse_temperature,
    WITH_TERMS: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i_tile, i_problem = tl.program_id(0), tl.program_id(2).to(tl.int64)
    features_p += i_problem * row_count * width
    bank_p += i_problem * bank_stride
    o_rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_local = i_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    o_columns = first + o_local.to(tl.int64)
    m_rows, m_columns = o_rows < row_count, o_columns < bank_count
    scores = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        o_width = start + tl.arange(0, BLOCK_WIDTH)
        m_width = o_width < width
        b_features = tl.load(
            features_p + o_rows[:, None] * width + o_width[None, :], mask=m_rows[:, None] & m_width[None, :], other=0.0
        )
        b_bank = tl.load(
            bank_p + o_columns[None, :] * width + o_width[:, None],
            mask=m_columns[None, :] & m_width[:, None],
            other=0.0,
        )
        if not NATIVE:  # else two half operands, whose products are exact in float32
            b_features, b_bank = b_features.to(tl.float32), b_bank.to(tl.float32)
        scores = tl.dot(b_features, b_bank, scores, input_precision=PRECISION)
    scores *= inverse_temperature
    o_partial = (i_problem * (CHUNK // BLOCK_COLUMNS) + i_tile) * row_count + o_rows
    if WITH_WEIGHTS:
        weights_p += i_problem * row_count * bank_count
        b_weights = tl.load(
            weights_p + o_rows[:, None] * bank_count + o_columns[None, :],
            mask=m_rows[:, None] & m_columns[None, :],
            other=0.0,
        ).to(tl.float32)
        tl.store(products_p + o_partial, tl.sum(b_weights * scores, axis=1), mask=m_rows)
    scores = tl.where(m_columns[None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    terms = tl.exp(scores - largest[:, None])
    tl.store(largest_p + o_partial, largest, mask=m_rows)
    tl.store(sums_p + o_partial, tl.sum(terms, axis=1), mask=m_rows)
    if WITH_TERMS:
        terms_p += i_problem * row_count * CHUNK
        tl.store(terms_p + o_rows[:, None] * CHUNK + o_local[None, :], terms, mask=m_rows[:, None])


@triton.jit
def _merge_kernel(
    tile_largest_p,
    tile_sums_p,
    largest_p,
    sums_p,
    rescale_p,
    row_count,
    tile_count,
    MOST_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    i_problem = tl.program_id(1).to(tl.int64)
    tile_largest_p += i_problem * MOST_TILES * row_count
    tile_sums_p += i_problem * MOST_TILES * row_count
    largest_p += i_problem * row_count
    sums_p += i_problem * row_count
    rescale_p += i_problem * row_count
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < row_count
    before = tl.load(largest_p + o_rows, mask=m_rows, other=0.0)
    largest = before
    for tile in range(tile_count):
        b_largest = tl.load(tile_largest_p + tile * row_count + o_rows, mask=m_rows, other=0.0)
        largest = tl.maximum(largest, b_largest, propagate_nan=tl.PropagateNan.ALL)
    rescale = tl.exp(before - largest)
    sums = tl.load(sums_p + o_rows, mask=m_rows, other=0.0) * rescale
    for tile in range(tile_count):
        o_tile = tile * row_count + o_rows
        share = tl.exp(tl.load(tile_largest_p + o_tile, mask=m_rows, other=0.0) - largest)
        sums += tl.load(tile_sums_p + o_tile, mask=m_rows, other=0.0) * share
        tl.store(tile_largest_p + o_tile, share, mask=m_rows)
    tl.store(largest_p + o_rows, largest, mask=m_rows)
    tl.store(sums_p + o_rows, sums, mask=m_rows)
    tl.store(rescale_p + o_rows, rescale, mask=m_rows)


@triton.jit
def _spread_kernel(
    terms_p,
    shares_p,
    rescale_p,
    bank_p,
    gradient_p,
    row_count,
    bank_count,
    width,
    bank_stride,
    first,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i_problem = tl.program_id(2).to(tl.int64)
    terms_p += i_problem * row_count * CHUNK
    shares_p += i_problem * (CHUNK // TILE) * row_count
    rescale_p += i_problem * row_count
    bank_p += i_problem * bank_stride
    gradient_p += i_problem * row_count * width
    o_width = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    o_rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_width, m_rows = o_width < width, o_rows < row_count
    o_gradient = o_rows[:, None] * width + o_width[None, :]
    m_gradient = m_rows[:, None] & m_width[None, :]
    gradient = tl.load(gradient_p + o_gradient, mask=m_gradient, other=0.0)
    gradient *= tl.load(rescale_p + o_rows, mask=m_rows, other=0.0)[:, None]
    for start in range(0, tl.minimum(CHUNK, bank_count - first), BLOCK_COLUMNS):
        o_local = start + tl.arange(0, BLOCK_COLUMNS)
        o_columns = first + o_local.to(tl.int64)
        m_columns = o_columns < bank_count
        # Beyond the bank the terms are 0, as exp(-inf) is.
        terms = tl.load(terms_p + o_rows[:, None] * CHUNK + o_local[None, :], mask=m_rows[:, None], other=0.0)
        terms *= tl.load(shares_p + (start // TILE) * row_count + o_rows, mask=m_rows, other=0.0)[:, None]
        b_bank = tl.load(
            bank_p + o_columns[:, None] * width + o_width[None, :],
            mask=m_columns[:, None] & m_width[None, :],
            other=0.0,
        ).to(tl.float32)
        gradient = tl.dot(terms, b_bank, gradient, input_precision=PRECISION)
    tl.store(gradient_p + o_gradient, gradient, mask=m_gradient)


@dataclass(frozen=True)
class Softmax:
    """Per row: the largest score, the sum of e^(s - largest), and, where asked for, sum_j e^(s_ij - largest_i) m_j.

    Attributes:
        largest, sums: `[P, B]` float32.
        gathered: `[P, B, D]` float32, or None.
        products: `[P, B]` float32 sum_j w_ij s_ij where weights were given, or None.
    """

    largest: Tensor
    sums: Tensor
    gathered: Tensor | None
    products: Tensor | None


def problems(features: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous features [P, B, D], and [P, N, D] banks, each contiguous: where they lie, if they lie so."""
    bank = merge(bank)
    return merge(features).contiguous(), bank if bank[:1].is_contiguous() else bank.contiguous()


def softmax_of(
    features: Tensor,
    bank: Tensor,
    temperature: float,
    *,
    gathered: Tensor | None,
    weights: Tensor | None = None,
    precision: str,
) -> Softmax:
    """One pass over the bank of every problem, as `problems` returns them, with weights `[P, B, N]` contiguous.

    `gathered` `[P, B, D]` float32 zeros receives the sums of bank rows; None leaves them out.
    """
    (problem_count, row_count, width), bank_count = features.shape, bank.shape[1]
    row_blocks = triton.cdiv(row_count, BLOCK_ROWS)
    tile_count = CHUNK_ROWS // TILE_COLUMNS
    largest, sums, rescale = features.new_empty(3, problem_count, row_count, dtype=torch.float32)
    largest.fill_(-torch.inf)
    sums.zero_()
    partial = features.new_empty(3, problem_count, tile_count, row_count, dtype=torch.float32)
    term_columns = CHUNK_ROWS if gathered is not None else 0
    terms = features.new_empty(problem_count, row_count, term_columns, dtype=torch.float32)
    products = None if weights is None else torch.zeros_like(sums)
    dot = {"ieee": "tf32x3", "fast": "tf32"}[precision]
    for first in range(0, bank_count, CHUNK_ROWS):
        tiles = triton.cdiv(min(CHUNK_ROWS, bank_count - first), TILE_COLUMNS)
        _score_kernel[(tiles, row_blocks, problem_count)](
            features,
            bank,
            weights,
            terms,
            partial[0],
            partial[1],
            partial[2],
            row_count,
            bank_count,
            width,
            bank.stride(0),
            first,
            1 / temperature,
            WITH_TERMS=gathered is not None,
            WITH_WEIGHTS=weights is not None,
            NATIVE=features.dtype == bank.dtype and not interpreted(),
            PRECISION=dot,
            CHUNK=CHUNK_ROWS,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=TILE_COLUMNS,
            BLOCK_WIDTH=32,
            num_warps=8,
        )
        if products is not None:
            products += partial[2, :, :tiles].sum(dim=1)
        _merge_kernel[(triton.cdiv(row_count, 32), problem_count)](
            partial[0],
            partial[1],
            largest,
            sums,
            rescale,
            row_count,
            tiles,
            MOST_TILES=tile_count,
            BLOCK_ROWS=32,
            num_warps=1,
        )
        if gathered is not None:
            _spread_kernel[(triton.cdiv(width, 64), row_blocks, problem_count)](
                terms,
                partial[0],
                rescale,
                bank,
                gathered,
                row_count,
                bank_count,
                width,
                bank.stride(0),
                first,
                PRECISION=dot,
                CHUNK=CHUNK_ROWS,
                TILE=TILE_COLUMNS,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_COLUMNS=32,
                BLOCK_WIDTH=64,
                num_warps=8,
            )
    return Softmax(largest, sums, gathered, products)

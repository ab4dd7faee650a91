"""Contrast of features against an instance bank with a set of positives per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._contrast import problems, softmax_of


@triton.jit
def _positives_kernel(
    features_p,
    bank_p,
    positives_p,
    scores_p,
    largest_p,
    sums_p,
    gradient_p,
    losses_p,
    row_count,
    bank_count,
    width,
    bank_stride,
    set_size,
    inverse_temperature,
    WITH_GRADIENT: tl.constexpr,
    BLOCK_SET: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One row of a problem: the scores of its positives, its loss, and what they take from its gradient."""
    row = tl.program_id(0).to(tl.int64)
    bank_p += (tl.program_id(0) // row_count).to(tl.int64) * bank_stride
    positives_p += row * set_size
    scores_p += row * set_size
    most = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.zeros([], dtype=tl.float32)
    found = tl.zeros([], dtype=tl.int32)
    for first in range(0, set_size, BLOCK_SET):
        o_set = first + tl.arange(0, BLOCK_SET)
        positives = tl.load(positives_p + o_set, mask=o_set < set_size, other=-1)
        kept = (positives >= 0) & (positives < bank_count)
        for earlier in range(0, first + 1, BLOCK_SET):  # of equal positives the first counts
            o_other = earlier + tl.arange(0, BLOCK_SET)
            others = tl.load(positives_p + o_other, mask=o_other < set_size, other=-1)
            repeated = (positives[:, None] == others[None, :]) & (o_other[None, :] < o_set[:, None])
            kept = kept & (tl.sum(repeated.to(tl.int32), axis=1) == 0)
        found += tl.sum(kept.to(tl.int32), axis=0)
        scores = tl.zeros([BLOCK_SET], dtype=tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            o_width = start + tl.arange(0, BLOCK_WIDTH)
            m_width = o_width < width
            b_features = tl.load(features_p + row * width + o_width, mask=m_width, other=0.0).to(tl.float32)
            o_bank = positives[:, None] * width + o_width[None, :]
            b_bank = tl.load(bank_p + o_bank, mask=kept[:, None] & m_width[None, :], other=0.0).to(tl.float32)
            scores += tl.sum(b_bank * b_features[None, :], axis=1)
        scores = tl.where(kept, scores * inverse_temperature, float("-inf"))
        tl.store(scores_p + o_set, scores, mask=o_set < set_size)
        larger = tl.maximum(most, tl.max(scores, axis=0), propagate_nan=tl.PropagateNan.ALL)
        terms = tl.where(kept, tl.exp(scores - larger), 0.0)
        total = tl.where(total > 0, total * tl.exp(most - larger), 0.0) + tl.sum(terms, axis=0)
        most = larger
    sums = tl.load(sums_p + row)
    loss = tl.load(largest_p + row) - most + tl.log(sums) - tl.log(total)
    tl.store(losses_p + row, tl.where(found > 0, loss, 0.0))
    if WITH_GRADIENT:
        tl.debug_barrier()  # the scores are read by other threads than wrote them
        for start in range(0, width, BLOCK_WIDTH):
            o_width = start + tl.arange(0, BLOCK_WIDTH)
            m_width = o_width < width
            gradient = tl.load(gradient_p + row * width + o_width, mask=m_width, other=0.0) / sums
            for first in range(0, set_size, BLOCK_SET):
                o_set = first + tl.arange(0, BLOCK_SET)
                scores = tl.load(scores_p + o_set, mask=o_set < set_size, other=float("-inf"))
                kept = scores != float("-inf")
                targets = tl.where(kept, tl.exp(scores - most) / total, 0.0)
                positives = tl.load(positives_p + o_set, mask=kept, other=0)
                o_bank = positives[:, None] * width + o_width[None, :]
                b_bank = tl.load(bank_p + o_bank, mask=kept[:, None] & m_width[None, :], other=0.0).to(tl.float32)
                gradient -= tl.sum(targets[:, None] * b_bank, axis=0)
            gradient = tl.where(found > 0, gradient * inverse_temperature, 0.0)
            tl.store(gradient_p + row * width + o_width, gradient, mask=m_width)


def neighbor_contrast(
    features: Tensor, bank: Tensor, positives: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and, when asked for, their gradients [..., B, D], float32."""
    (*leading, row_count, width), set_size = features.shape, positives.shape[-1]
    losses = features.new_empty(*leading, row_count, dtype=torch.float32)
    gradient = features.new_zeros(*leading, row_count if with_gradient else 0, width, dtype=torch.float32)
    if losses.numel() == 0:
        return losses, gradient
    (features, bank), positives = problems(features, bank), positives.contiguous()
    gathered = gradient.view(features.shape) if with_gradient else None
    softmax = softmax_of(features, bank, temperature, gathered=gathered, precision=precision)
    _positives_kernel[(losses.numel(),)](
        features,
        bank,
        positives,
        torch.empty_like(positives, dtype=torch.float32),
        softmax.largest,
        softmax.sums,
        gradient,
        losses,
        row_count,
        bank.shape[1],
        width,
        bank.stride(0),
        set_size,
        1 / temperature,
        WITH_GRADIENT=with_gradient,
        BLOCK_SET=min(32, triton.next_power_of_2(max(4, set_size))),
        BLOCK_WIDTH=128,
        num_warps=4,
    )
    return losses, gradient

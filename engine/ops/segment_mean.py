"""Means of the rows that share a label."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype


def segment_mean(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """`m_c = mean of f_i over labels[i] = c`: cluster centres, not normalised.

    Args:
        features: `[N, D]` float32, float16, bfloat16 or float64; gradients flow.
        labels: `[N]` int64 in [-1, count), -1 = in no segment.
        count: C, the number of segments.

    Returns:
        `[C, D]` in the dtype of `features`; an empty segment is zero.

    Raises:
        TypeError, ValueError: an argument is not as described; labels out of range under `ENGINE_DEBUG=1` (such rows
            are in no segment otherwise).
    """
    _check.tensor("features", features, "N D")
    _check.indices("labels", labels, "N")
    _check.like("labels", labels, "features", features, dtype=False)
    _check.size("labels", labels, 0, features.shape[0], "the rows of features")
    _check.count("count", count)
    _check.in_range("labels", labels, count)
    return pick("segment_mean", features.device)(features, labels, count)


def reference(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Rows sorted by label, so that each mean adds its rows in their order on any device."""
    ordered, order = labels.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(count + 1, device=labels.device))
    rows = features.to(accumulation_dtype(features))[order]
    sums = torch.segment_reduce(rows, "sum", offsets=offsets, axis=0, unsafe=True)
    return (sums / offsets.diff().clamp(min=1).unsqueeze(1)).to(features.dtype)

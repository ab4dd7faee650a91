"""Means of the rows that share a label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.ops import _check, _cuda, _native
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

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> ops.segment_mean(features, torch.tensor([0, 0, -1]), count=2)
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])
    """
    _check.tensor("features", features, "N D")
    _check.indices("labels", labels, "N")
    _check.like("labels", labels, "features", features, dtype=False)
    _check.size("labels", labels, 0, features.shape[0], "the rows of features")
    count = _check.count("count", count)
    _check.in_range("labels", labels, count)
    return _segment_mean(features, labels, count)


def reference(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Rows sorted by label, so that each mean adds its rows in their order on any device."""
    ordered, order = labels.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(count + 1, device=labels.device))
    rows = features.to(accumulation_dtype(features))[order]
    sums = torch.segment_reduce(rows, "sum", offsets=offsets, axis=0, unsafe=True)
    return (sums / offsets.diff().clamp(min=1).unsqueeze(1)).to(features.dtype)


def cpu(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """csrc/segment_mean.cpp: the rows read once, in their order, each added to the sum of its label."""
    dtype = accumulation_dtype(features)
    rows, labels = features.contiguous(), labels.contiguous()
    means = rows.new_empty(count, rows.shape[1], dtype=dtype)
    _native.function("segment_mean", dtype)(
        *_native.rows(rows),
        labels.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        count,
        means.data_ptr(),
    )
    return means.to(features.dtype)


def cuda(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """csrc/segment_mean.cu: rows sorted by label, then a thread per column of a mean adds them in their order."""
    rows = features.contiguous()
    means = rows.new_empty(count, rows.shape[1], dtype=torch.float32)
    ordered, order = labels.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=labels.device))
    kernel = f"segment_mean_{_cuda.name_of(rows.dtype)}_kernel"
    grid = count, -(-rows.shape[1] // 256)
    _cuda.launch("segment_mean", kernel, grid, 256, (rows, order, starts, rows.shape[1], means))
    return means.to(features.dtype)


@torch.library.custom_op("engine::segment_mean", mutates_args=())
def _segment_mean(features: Tensor, labels: Tensor, count: int) -> Tensor:
    return pick("segment_mean", features)(features, labels, count)


@_segment_mean.register_fake
def _(features: Tensor, labels: Tensor, count: int) -> Tensor:
    return features.new_empty(count, features.shape[1])


def _keep_labels(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad_means: Tensor) -> tuple[Tensor, None, None]:
    """Every row gets the gradient of its mean over the size of its segment."""
    (labels,) = ctx.saved_tensors
    count = grad_means.shape[0]
    segment = torch.where((labels >= 0) & (labels < count), labels, count)  # `count` for those in none
    sizes = labels.new_zeros(count + 1).index_add_(0, segment, torch.ones_like(segment))[:count]
    shares = grad_means.to(accumulation_dtype(grad_means)) / sizes.clamp(min=1).unsqueeze(1)
    nothing = shares.new_zeros(1, shares.shape[1])
    return torch.cat([shares, nothing]).to(grad_means.dtype)[segment], None, None


_segment_mean.register_autograd(_backward, setup_context=_keep_labels)

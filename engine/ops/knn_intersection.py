"""The bank rows that are near to several views of a sample at once."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from engine.ops import _check, _cuda, _sets
from engine.ops._backend import pick
from engine.ops._precision import check_precision
from engine.ops.set_intersection import set_intersection
from engine.ops.topk import topk


@torch.no_grad()
def knn_intersection(views: Tensor, bank: Tensor, k: int, *, precision: str = "ieee") -> Tensor:
    """The indices in the k-nearest sets of all views of a sample, SALCR Eq. 16, 17.

    Args:
        views: `[V, B, D]` float, V >= 1 features of each of B samples; no gradient is computed.
        bank: `[N, D]` float.
        k: neighbours of each view, by (inner product descending, index ascending).
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        `[B, k]` int64, ascending, padded with -1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> bank = torch.eye(4)
        >>> views = torch.tensor([[[0.9, 0.8, 0.1, 0.0]], [[0.7, 0.1, 0.9, 0.0]]])  # two views of one sample
        >>> ops.knn_intersection(views, bank, k=2)
        tensor([[ 0, -1]])
    """
    _check.tensor("views", views, "V B D")
    if views.shape[0] == 0:
        raise _check.fail("views", "at least one view", views)
    _check.tensor("bank", bank, "N D")
    _check.like("bank", bank, "views", views, dtype=False)
    _check.size("bank", bank, 1, views.shape[2], "the width of views")
    k = _check.count("k", k)
    check_precision(precision)
    return pick("knn_intersection", views, bank)(views, bank, k, precision=precision)


def reference(views: Tensor, bank: Tensor, k: int, *, precision: str = "ieee") -> Tensor:
    """One `topk` over all views, then `set_intersection` view after view."""
    _, indices = topk(views.flatten(0, 1), bank, k, precision=precision)
    neighbours = indices.unflatten(0, views.shape[:2])
    # A single view goes through the intersection with itself, which sorts it.
    return reduce(set_intersection, neighbours, neighbours[0])


def cpu(views: Tensor, bank: Tensor, k: int, *, precision: str = "ieee") -> Tensor:
    """One `topk` over all views, then csrc/knn_intersection.cpp over all of them at once."""
    from engine import _C

    _, indices = topk(views.flatten(0, 1), bank, k, precision=precision)
    view_count, row_count, _ = views.shape
    common = indices.new_empty(row_count, k)
    _C.knn_intersection(indices.data_ptr(), view_count, row_count, k, common.data_ptr(), torch.get_num_threads())
    return common


def cuda(views: Tensor, bank: Tensor, k: int, *, precision: str = "ieee") -> Tensor:
    """One `topk` over all views, then csrc/knn_intersection.cu: a warp per sample over all of them at once."""
    _, indices = topk(views.flatten(0, 1), bank, k, precision=precision)
    view_count, row_count, _ = views.shape
    common = indices.new_empty(row_count, k)
    scratch, shared_bytes = _sets.room(row_count, view_count * k, indices)
    arguments = (indices, view_count, k, scratch, common)
    _cuda.launch("knn_intersection", "knn_intersection_kernel", row_count, 32, arguments, shared_bytes=shared_bytes)
    return common

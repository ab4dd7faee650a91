"""Row-wise intersection of padded index sets."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _cuda, _sets
from engine.ops._backend import pick


def set_intersection(a: Tensor, b: Tensor) -> Tensor:
    """The indices in `a[i]` and in `b[i]`, for every row i. SALCR Eq. 21-23.

    Args:
        a: `[B, P]` int64 in any order; a negative entry is padding, a repeated one counts once.
        b: `[B, Q]`, likewise.

    Returns:
        `[B, min(P, Q)]` int64, ascending, padded with -1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> ops.set_intersection(torch.tensor([[4, 2, 7]]), torch.tensor([[7, 4, -1]]))
        tensor([[ 4,  7, -1]])
    """
    _sets.check(a, b)
    return pick("set_intersection", a)(a, b)


def reference(a: Tensor, b: Tensor) -> Tensor:
    """Both rows sorted as one, in which an index of both stands twice."""
    rows = torch.cat([_sets.ascending(a), _sets.ascending(b)], dim=1).sort(dim=1).values
    common = torch.where(rows[:, 1:] == rows[:, :-1], rows[:, :-1], _sets.PADDING)
    return _sets.padded(common.sort(dim=1).values[:, : min(a.shape[1], b.shape[1])])


def cpu(a: Tensor, b: Tensor) -> Tensor:
    """csrc/set_intersection.cpp: both rows sorted, then read side by side."""
    from engine import _C

    a, b = a.contiguous(), b.contiguous()
    common = a.new_empty(a.shape[0], min(a.shape[1], b.shape[1]))
    _C.set_intersection(
        a.data_ptr(), b.data_ptr(), len(a), a.shape[1], b.shape[1], common.data_ptr(), torch.get_num_threads()
    )
    return common


def cuda(a: Tensor, b: Tensor) -> Tensor:
    """csrc/set_intersection.cu: a warp sorts both rows, then looks for the entries of one in the other."""
    a, b = a.contiguous(), b.contiguous()
    common = a.new_empty(a.shape[0], min(a.shape[1], b.shape[1]))
    scratch, shared_bytes = _sets.room(len(a), a.shape[1] + b.shape[1], a)
    arguments = (a, b, a.shape[1], b.shape[1], scratch, common)
    _cuda.launch("set_intersection", "set_intersection_kernel", len(a), 32, arguments, shared_bytes=shared_bytes)
    return common

"""Row-wise union of padded index sets."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _cuda, _sets
from engine.ops._backend import pick


def set_union(a: Tensor, b: Tensor) -> Tensor:
    """The indices in `a[i]` or `b[i]`, for every row i. SALCR Eq. 21-23.

    Args:
        a: `[B, P]` int64 in any order; a negative entry is padding, a repeated one counts once.
        b: `[B, Q]`, likewise.

    Returns:
        `[B, P + Q]` int64, ascending, padded with -1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> ops.set_union(torch.tensor([[4, 2]]), torch.tensor([[7, 4]]))
        tensor([[ 2,  4,  7, -1]])
    """
    _sets.check(a, b)
    return pick("set_union", a)(a, b)


def reference(a: Tensor, b: Tensor) -> Tensor:
    """Both rows sorted as one."""
    return _sets.padded(_sets.ascending(torch.cat([a, b], dim=1)))


def cpu(a: Tensor, b: Tensor) -> Tensor:
    """csrc/set_union.cpp: both rows sorted as one."""
    from engine import _C

    a, b = a.contiguous(), b.contiguous()
    joined = a.new_empty(a.shape[0], a.shape[1] + b.shape[1])
    _C.set_union(a.data_ptr(), b.data_ptr(), len(a), a.shape[1], b.shape[1], joined.data_ptr(), torch.get_num_threads())
    return joined


def cuda(a: Tensor, b: Tensor) -> Tensor:
    """csrc/set_union.cu: a warp sorts both rows as one."""
    a, b = a.contiguous(), b.contiguous()
    joined = a.new_empty(a.shape[0], a.shape[1] + b.shape[1])
    scratch, shared_bytes = _sets.room(len(a), joined.shape[1], a)
    arguments = (a, b, a.shape[1], b.shape[1], scratch, joined)
    _cuda.launch("set_union", "set_union_kernel", len(a), 32, arguments, shared_bytes=shared_bytes)
    return joined

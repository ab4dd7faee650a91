"""The momentum update of a memory bank."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from engine.ops import _check, _cuda
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype
from engine.ops._problems import each, for_rows

SEARCHED = 4096
"""Features of a batch up to which a GPU finds those of a label faster than it sorts them."""


def memory_update_(
    bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor, *, normalize: bool = True
) -> Tensor:
    """Blend features into the bank rows of their labels, one after the other in batch order.

    For i in order, `y = labels[i]`: `bank[y] = momentum * bank[y] + (1 - momentum) * features[i]`, then divided by its
    L2 norm when `normalize` (SALCR, after Eq. 3; FIRM Eq. 14 with `normalize=False`). Not for use inside a backward.

    Args:
        bank: `[..., C, D]` float32, float16, bfloat16 or float64, changed in place; half types are rounded once, at the
            end. The dimensions before the last two, if any, count problems: banks that are updated together, each by
            features of its own.
        features: `[..., B, D]` float, taken as given; no gradient is computed.
        labels: `[..., B]`, or `[B]` for all problems, int64 in [-1, C); -1 is skipped.
        momentum: the weight of the old row, in [0, 1]: a number, or `[..., B]` or `[B]` float with one weight per
            feature.
        normalize: divide each new row by its norm; a zero row stays zero.

    Returns:
        `bank` itself.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bank requires a gradient.

    Example:
        >>> memory = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> features = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
        >>> ops.memory_update_(memory, features, torch.tensor([0, -1]), momentum=0.1)
        tensor([[0.6644, 0.7474],
                [0.0000, 1.0000]])
    """
    _check_arguments(bank, features, labels, momentum)
    run = pick("memory_update_", bank, features)
    dtype = accumulation_dtype(bank, features)
    if features.untyped_storage().data_ptr() == bank.untyped_storage().data_ptr():
        features = features.clone()  # rows of the bank itself, as they are before the update
    if features.dtype != dtype:
        features = features.to(dtype)
    labels = for_rows(labels, features)
    if isinstance(momentum, Tensor):
        momentum = for_rows(momentum.to(dtype), features)
    banks = _as_they_lie(bank) if bank.dtype == dtype else None
    if banks is not None:
        run(banks, features, labels, momentum, normalize=normalize)
        return bank

    # The rows that are named, of whatever problem, become one bank.
    row_count = bank.shape[-2]
    inside = (labels >= 0) & (labels < row_count)
    first = row_count * torch.arange(prod(bank.shape[:-2]), device=bank.device).view(*bank.shape[:-2], 1)
    touched, names = (first + labels)[inside].unique(return_inverse=True)
    where = torch.unravel_index(touched, bank.shape[:-1])
    weights = momentum[inside] if isinstance(momentum, Tensor) else momentum
    rows = run(bank[where].to(dtype), features[inside], names, weights, normalize=normalize)
    return bank.index_put_(where, rows.to(bank.dtype))


@torch.no_grad()
def reference(
    bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor, *, normalize: bool = True
) -> Tensor:
    """Labels are independent: the r-th feature of every label is blended at once, for r = 0, 1, ..."""
    for own, rows, names, weights in _problems(bank, features, for_rows(labels, features), momentum):
        _blend(own, rows, names, weights, normalize)
    return bank


def cpu(bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor, *, normalize: bool = True) -> Tensor:
    """csrc/memory_update_.cpp: each row once through the cache, in batch order; threads over labels."""
    from engine import _C

    update = _C.memory_update_float64 if bank.dtype == torch.float64 else _C.memory_update_float32
    features, labels = features.contiguous(), labels.contiguous()
    if isinstance(momentum, Tensor):
        momentum = momentum.contiguous()
    for own, rows, names, weights in _problems(bank, features, labels, momentum):
        update(
            own.data_ptr(),
            rows.data_ptr(),
            names.data_ptr(),
            *((weights.data_ptr(), 0.0) if isinstance(weights, Tensor) else (0, weights)),
            own.shape[0],
            rows.shape[0],
            rows.shape[1],
            normalize,
            torch.get_num_threads(),
        )
    torch.autograd.graph.increment_version(bank)  # as every in-place operator of torch does
    return bank


def cuda(bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor, *, normalize: bool = True) -> Tensor:
    """csrc/memory_update_.cu: a block per label of a problem carries its row through the batch."""
    features, order = features.contiguous(), None
    if labels.shape[-1] > SEARCHED:
        labels, order = labels.sort(stable=True)
    each, shared = (momentum.contiguous(), 0.0) if isinstance(momentum, Tensor) else (None, float(momentum))
    sizes = bank.stride(0), bank.shape[-2], *features.shape[-2:]
    arguments = (bank, features, labels.contiguous(), order, each, shared, *sizes, normalize)
    _cuda.launch("memory_update_", "memory_update_kernel", labels.numel(), 256, arguments)
    torch.autograd.graph.increment_version(bank)
    return bank


def _check_arguments(bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor) -> None:
    _check.tensor("bank", bank, "... C D")
    if bank.requires_grad:
        raise _check.fail("bank", "a tensor that requires no gradient", bank)
    if (
        0 in bank.stride()
        and bank.numel()
        and any(size > 1 and step == 0 for size, step in zip(bank.shape, bank.stride(), strict=True))
    ):
        raise _check.fail("bank", "a tensor whose entries have memory of their own, as a clone of it would be", bank)
    _check.tensor("features", features, "... B D")
    _check.leading("features", features, 2, bank.shape[:-2], "bank")
    _check.like("features", features, "bank", bank, dtype=False)
    _check.size("features", features, -1, bank.shape[-1], "the width of bank")
    _check.indices("labels", labels, "... B")
    _check.per_row("labels", labels, "features", features)
    _check.in_range("labels", labels, bank.shape[-2])
    if isinstance(momentum, Tensor):
        _check.tensor("momentum", momentum, "... B")
        _check.per_row("momentum", momentum, "features", features)
    elif isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
        raise _check.fail("momentum", "a number in [0, 1] or a tensor [B]", momentum)


def _as_they_lie(bank: Tensor) -> Tensor | None:
    """One contiguous bank, or [P, C, D], a view of such ones; None where the rows do not lie so."""
    if bank.dim() == 2:
        return bank if bank.is_contiguous() else None
    try:
        banks = bank.view(prod(bank.shape[:-2]), *bank.shape[-2:])
    except RuntimeError:
        return None
    return banks if banks[:1].is_contiguous() else None


def _problems(
    bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, float | Tensor]]:
    """Bank, features, labels and momentum of one problem after the other."""
    banks = each(bank, 2)
    weights = each(for_rows(momentum, features), 1) if isinstance(momentum, Tensor) else [momentum] * len(banks)
    return zip(banks, each(features, 2), each(labels, 1), weights, strict=True)


def _blend(bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor, normalize: bool) -> None:
    """One problem of the reference: [C, D], [B, D], [B] and a number or [B]."""
    kept = ((labels >= 0) & (labels < bank.shape[0])).nonzero().squeeze(1)
    occurrence = _occurrence(labels[kept])
    round_count = int(occurrence.max()) + 1 if kept.numel() else 0
    for number in range(round_count):
        rows = kept[occurrence == number]
        weight = momentum[rows].unsqueeze(1) if isinstance(momentum, Tensor) else momentum
        blended = weight * bank[labels[rows]] + (1 - weight) * features[rows]
        if normalize:
            norm = blended.norm(dim=1, keepdim=True)
            blended = blended / torch.where(norm > 0, norm, 1)
        bank[labels[rows]] = blended


def _occurrence(labels: Tensor) -> Tensor:
    """How many times the label of each entry came before it."""
    ordered, order = labels.sort(stable=True)
    place = torch.arange(labels.numel(), device=labels.device)
    return torch.empty_like(order).scatter_(0, order, place - torch.searchsorted(ordered, ordered))

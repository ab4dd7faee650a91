"""The momentum update of a memory bank."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype


@torch.no_grad()
def memory_update_(
    bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor, *, normalize: bool = True
) -> Tensor:
    """Blend features into the bank rows of their labels, one after the other in batch order.

    For i in order, `y = labels[i]`: `bank[y] = momentum * bank[y] + (1 - momentum) * features[i]`, then divided by its
    L2 norm when `normalize` (SALCR, after Eq. 3; FIRM Eq. 14 with `normalize=False`). Not for use inside a backward.

    Args:
        bank: `[C, D]` float32, float16, bfloat16 or float64, changed in place; half types are rounded once, at the end.
        features: `[B, D]` float, taken as given; no gradient is computed.
        labels: `[B]` int64 in [-1, C); -1 is skipped.
        momentum: the weight of the old row, in [0, 1]: a number, or `[B]` float with one weight per feature.
        normalize: divide each new row by its norm; a zero row stays zero.

    Returns:
        `bank` itself.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bank requires a gradient.
    """
    _check_arguments(bank, features, labels, momentum)
    dtype = accumulation_dtype(bank, features)
    if not isinstance(momentum, Tensor):
        momentum = torch.full(labels.shape, momentum, dtype=dtype, device=labels.device)
    updated = bank.to(dtype).contiguous()
    if features.untyped_storage().data_ptr() == bank.untyped_storage().data_ptr():
        features = features.clone()  # rows of the bank itself, as they are before the update
    run = pick("memory_update_", bank.device)
    run(updated, features.to(dtype), labels, momentum.to(dtype), normalize=normalize)
    return bank if updated is bank else bank.copy_(updated)


def reference(bank: Tensor, features: Tensor, labels: Tensor, momentum: Tensor, *, normalize: bool = True) -> Tensor:
    """Labels are independent: the r-th feature of every label is blended at once, for r = 0, 1, ..."""
    kept = ((labels >= 0) & (labels < bank.shape[0])).nonzero().squeeze(1)
    occurrence = _occurrence(labels[kept])
    round_count = int(occurrence.max()) + 1 if kept.numel() else 0
    for number in range(round_count):
        rows = kept[occurrence == number]
        weight = momentum[rows].unsqueeze(1)
        blended = weight * bank[labels[rows]] + (1 - weight) * features[rows]
        if normalize:
            norm = blended.norm(dim=1, keepdim=True)
            blended = blended / torch.where(norm > 0, norm, 1)
        bank[labels[rows]] = blended
    return bank


def cpu(bank: Tensor, features: Tensor, labels: Tensor, momentum: Tensor, *, normalize: bool = True) -> Tensor:
    """csrc/memory_update_.cpp: one pass over the batch, threads over labels."""
    from engine import _C

    update = _C.memory_update_float64 if bank.dtype == torch.float64 else _C.memory_update_float32
    features, labels, momentum = features.contiguous(), labels.contiguous(), momentum.contiguous()
    update(
        bank.data_ptr(),
        features.data_ptr(),
        labels.data_ptr(),
        momentum.data_ptr(),
        bank.shape[0],
        features.shape[0],
        features.shape[1],
        normalize,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(bank)  # as every in-place operator of torch does
    return bank


def _check_arguments(bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor) -> None:
    _check.tensor("bank", bank, "C D")
    if bank.requires_grad:
        raise _check.fail("bank", "a tensor that requires no gradient", bank)
    _check.tensor("features", features, "B D")
    _check.like("features", features, "bank", bank, dtype=False)
    _check.size("features", features, 1, bank.shape[1], "the width of bank")
    _check.indices("labels", labels, "B")
    _check.like("labels", labels, "bank", bank, dtype=False)
    _check.size("labels", labels, 0, features.shape[0], "the rows of features")
    _check.in_range("labels", labels, bank.shape[0])
    if isinstance(momentum, Tensor):
        _check.tensor("momentum", momentum, "B")
        _check.like("momentum", momentum, "bank", bank, dtype=False)
        _check.size("momentum", momentum, 0, features.shape[0], "the rows of features")
    elif isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
        raise _check.fail("momentum", "a number in [0, 1] or a tensor [B]", momentum)


def _occurrence(labels: Tensor) -> Tensor:
    """How many times the label of each entry came before it."""
    ordered, order = labels.sort(stable=True)
    place = torch.arange(labels.numel(), device=labels.device)
    return torch.empty_like(order).scatter_(0, order, place - torch.searchsorted(ordered, ordered))

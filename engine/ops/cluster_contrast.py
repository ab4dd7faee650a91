"""Cross entropy of features against a bank of cluster prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import _check, _contrast, _native
from engine.ops._problems import for_rows


def cluster_contrast(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    reduction: str = "mean",
    precision: str = "ieee",
) -> Tensor:
    """`-log softmax_c(f_i . m_c / t)[y_i]`, SALCR Eq. 1, 2, 5, 6, 12, 13.

    Args:
        features: `[..., B, D]` float32, float16, bfloat16 or float64; the gradient goes here. The dimensions before
            the last two, if any, count problems: each has its bank and its loss, and all are computed together.
        bank: `[..., C, D]` float, constant.
        labels: `[..., B]`, or `[B]` for all problems, int64 in [-1, C); -1 leaves a row out, of the mean too.
        temperature: t > 0.
        reduction: "mean" over the rows of a problem that are not left out, "sum", or "none" for `[..., B]` losses, 0
            where left out.
        precision: "ieee" = products to the rounding of float32; "fast" = on a GPU they may be TF32 or bfloat16.

    Returns:
        The loss `[...]`, a scalar for one problem, in float32, or float64 if an input is float64. Without any row it is
        0, with gradient 0.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bank requires a gradient.
        NotImplementedError: a second derivative is asked for.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> labels = torch.tensor([0, -1])  # the second row is an outlier
        >>> loss = ops.cluster_contrast(features, prototypes, labels, temperature=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4), features.grad[1].tolist()
        (0.1429, [0.0, 0.0])
    """
    _contrast.check(features, bank, temperature, reduction, precision)
    _check_labels(features, bank, labels)
    labels = for_rows(labels, features)
    losses = _contrast.losses_of(_operator, features, bank, labels, temperature, precision)
    return _contrast.reduce(losses, _kept(labels, bank.shape[-2]), reduction)


def reference(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    reduction: str = "mean",
    precision: str = "ieee",
) -> Tensor:
    """The definition, on the whole [..., B, C] logits."""
    labels = for_rows(labels, features)
    losses = _row_losses(_contrast.logits(features, bank, temperature, precision), labels)
    return _contrast.reduce(losses, _kept(labels, bank.shape[-2]), reduction)


def rows(
    features: Tensor, bank: Tensor, labels: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and their gradients [..., B, D], in blocks of rows of the definition."""
    arguments = (features, bank, labels, temperature, with_gradient, precision)
    return _contrast.in_blocks(_row_losses, _residual, *arguments)


def cpu(
    features: Tensor, bank: Tensor, labels: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """csrc/neighbor_contrast.cpp, as the label is the only positive."""
    arguments = (features, bank, labels, _native.address, (1,), temperature, with_gradient)
    return _contrast.native("neighbor_contrast", *arguments)


_operator = _contrast.row_operator("cluster_contrast")


def _check_labels(features: Tensor, bank: Tensor, labels: Tensor) -> None:
    _check.indices("labels", labels, "... B")
    _check.per_row("labels", labels, "features", features)
    _check.in_range("labels", labels, bank.shape[-2])


def _kept(labels: Tensor, cluster_count: int) -> Tensor:
    return (labels >= 0) & (labels < cluster_count)


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    targets = torch.where(_kept(labels, logits.shape[-1]), labels, -1)
    flat = logits.flatten(0, -2), targets.flatten()
    return torch.nn.functional.cross_entropy(*flat, ignore_index=-1, reduction="none").view(labels.shape)


def _residual(logits: Tensor, labels: Tensor) -> Tensor:
    kept = _kept(labels, logits.shape[1]).unsqueeze(1)
    target = torch.arange(logits.shape[1], device=logits.device) == labels.unsqueeze(1)
    return torch.where(kept, logits.softmax(dim=1) - target.to(logits.dtype), 0)

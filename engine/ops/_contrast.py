"""What the losses against a memory bank share: one custom operator, blocks of rows, reductions.

The loss of a row depends on that row's features only. So an operator returns, with the losses [..., B], their gradients
d losses[i] / d features[i] as one [..., B, D] tensor: the backward is a product, neither logits nor bank are kept for
it, and a bank updated in between cannot spoil it. With residual = d losses / d logits [..., B, N], that gradient is
residual @ bank / temperature. Leading dimensions count problems that share nothing but the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from engine.ops import _check, _native
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype, check_precision, products
from engine.ops._problems import each

BLOCK_ENTRIES = 1 << 22
"""Logits held at a time: 16 MB of float32."""

REDUCTIONS = ("mean", "sum", "none")
RowOperator = Callable[[Tensor, Tensor, Tensor, float, bool, str], tuple[Tensor, Tensor]]


def check(features: Tensor, bank: Tensor, temperature: float, reduction: str, precision: str) -> None:
    """Check the arguments that all losses against a bank have. Features and bank may differ in float dtype."""
    _check.tensor("features", features, "... B D")
    _check.tensor("bank", bank, "... N D")
    _check.leading("bank", bank, 2, features.shape[:-2], "features")
    _check.like("bank", bank, "features", features, dtype=False)
    _check.size("bank", bank, -1, features.shape[-1], "the width of features")
    _check.constant("bank", bank)
    _check.positive("temperature", temperature)
    _check.choice("reduction", reduction, REDUCTIONS)
    check_precision(precision)


def logits(features: Tensor, bank: Tensor, temperature: float, precision: str) -> Tensor:
    """[..., B, N] inner products over the temperature, in float32 at least."""
    dtype = accumulation_dtype(features, bank)
    with products(features.device, precision):
        return (features.to(dtype) / temperature) @ bank.to(dtype).mT


def reduce(losses: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """The losses [..., B] of the `kept` rows [..., B] bool as they are, or of each problem summed or averaged.

    Rows left out are 0 already.
    """
    if reduction == "none":
        return losses
    total = losses.sum(dim=-1)
    return total if reduction == "sum" else total / kept.sum(dim=-1).clamp_min(1)


def in_blocks(
    row_losses: Callable[[Tensor, Tensor], Tensor],
    residual: Callable[[Tensor, Tensor], Tensor],
    features: Tensor,
    bank: Tensor,
    target: Tensor,
    temperature: float,
    with_gradient: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and, when asked for, their gradients [..., B, D], without the [B, N] logits in memory.

    Args:
        row_losses: (logits [b, N], target [b, ...]) -> losses [b].
        residual: (logits [b, N], target [b, ...]) -> d losses / d logits [b, N].
    """
    losses, gradient = _outputs(features, bank, target, temperature, with_gradient, precision)
    block_rows = max(1, BLOCK_ENTRIES // max(1, bank.shape[-2]))
    for problem in _problems(features, bank, target, losses, gradient):
        own, others, wanted, own_losses, own_gradient = problem
        others = others.to(losses.dtype)
        for start in range(0, own.shape[0], block_rows):
            rows = slice(start, start + block_rows)
            scores = logits(own[rows], others, temperature, precision)
            own_losses[rows] = row_losses(scores, wanted[rows])
            if with_gradient:
                with products(features.device, precision):
                    torch.mm(residual(scores, wanted[rows]), others, out=own_gradient[rows])
    return losses, gradient.div_(temperature)


def native(
    name: str,
    features: Tensor,
    bank: Tensor,
    target: Tensor,
    address: Callable[[Tensor], tuple[int, ...]],
    sizes: tuple[int, ...],
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [..., B] and, when asked for, their gradients [..., B, D], by the function `name` of engine._C.

    Args:
        target: what the loss has beside features and bank.
        address: what the function takes of the target of a problem, contiguous.
        sizes: what the function takes beside the rows of features and bank.
    """
    losses, gradient = _outputs(features, bank, target, temperature, with_gradient, "ieee")
    features = features.to(losses.dtype).contiguous()
    run, threads = _native.function(name, losses.dtype), torch.get_num_threads()
    for own, others, wanted, own_losses, own_gradient in _problems(features, bank, target, losses, gradient):
        others, wanted = others.contiguous(), wanted.contiguous()
        run(
            own.data_ptr(),
            *_native.rows(others),
            *address(wanted),
            own.shape[0],
            others.shape[0],
            *sizes,
            own.shape[1],
            temperature,
            own_losses.data_ptr(),
            own_gradient.data_ptr() if with_gradient else 0,
            threads,
        )
    return losses, gradient


def row_operator(name: str) -> RowOperator:
    """`engine::name`(features, bank, target, temperature, with_gradient, precision) -> (losses, gradient)."""

    def run(
        features: Tensor, bank: Tensor, target: Tensor, temperature: float, with_gradient: bool, precision: str
    ) -> tuple[Tensor, Tensor]:
        return pick(name, features, bank)(features, bank, target, temperature, with_gradient, precision)

    operator = torch.library.custom_op(f"engine::{name}", run, mutates_args=())
    operator.register_fake(_outputs)
    operator.register_autograd(_backward, setup_context=_keep_gradient)
    return operator


def losses_of(
    operator: RowOperator, features: Tensor, bank: Tensor, target: Tensor, temperature: float, precision: str
) -> Tensor:
    """Losses [..., B] of a row operator, with the gradient prepared only where a backward can follow."""
    with_gradient = features.requires_grad and torch.is_grad_enabled()
    return operator(features, bank, target, float(temperature), with_gradient, precision)[0]


def _outputs(
    features: Tensor, bank: Tensor, target: Tensor, temperature: float, with_gradient: bool, precision: str
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(features, bank)
    *problems, row_count, width = features.shape
    return (
        features.new_empty(*problems, row_count, dtype=dtype),
        features.new_empty(*problems, row_count if with_gradient else 0, width, dtype=dtype),
    )


def _problems(
    features: Tensor, bank: Tensor, target: Tensor, losses: Tensor, gradient: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """All of them of one problem after the other."""
    leading = features.dim() - 2
    parts = (features, bank, target, losses, gradient)
    return zip(*(each(part, part.dim() - leading) for part in parts), strict=True)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True would take the gradient for a constant
        raise NotImplementedError("a loss against a memory bank has no second derivative: create_graph must be False")
    (gradient,) = ctx.saved_tensors
    return (grad_losses.unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None, None, None

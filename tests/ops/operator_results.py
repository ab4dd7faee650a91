"""Calling an operator, and taking apart what it returns, for tests of what must hold for any of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engine import ops
from engine.ops._backend import exists

GRADIENTS = {"cluster_contrast": 0, "neighbor_contrast": 0, "propagate": 1, "segment_mean": 0, "soft_contrast": 0}
"""Which argument of a differentiable operator gets a gradient."""
SEARCHING = ("affinity", "cmfp", "jaccard", "knn_intersection")
"""Operators that call `topk`."""
AUTOMATIC = "automatic"
"""Not a back end: the engine's choice, for an operator that has no kernel of its own but calls one that has."""


def on_backend(name: str, backend: str) -> AbstractContextManager[object]:
    """Inside the block an operator runs on one back end; what searches by a `topk` that has no such form, by another."""
    if backend == AUTOMATIC or (name in SEARCHING and not exists("topk", backend)):
        return nullcontext()
    return ops.use_backend(backend)


def outcome(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What the operator returns, with the gradient of a weighted sum of it where there is one."""
    if name not in GRADIENTS:
        return function(*arguments, **options)
    place = GRADIENTS[name]
    source = arguments[place].detach().requires_grad_()
    value = function(*arguments[:place], source, *arguments[place + 1 :], **options)
    weights = 1 + torch.arange(value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape) % 3
    (gradient,) = torch.autograd.grad((value * weights).sum(), source)
    return value.detach(), gradient


def tensors(result: Any) -> list[Tensor]:
    """All that a result holds."""
    if isinstance(result, ops.Sinkhorn):
        fields = result.log_u, result.log_v, result.iterations, result.error
        return [*fields, result.plan(), result.labels(), result.confidence()]
    if isinstance(result, ops.Ranking):
        return [result.cmc, torch.tensor([result.mAP, result.mINP, result.valid_queries], dtype=torch.float64)]
    if isinstance(result, tuple):
        return [part for element in result for part in tensors(element)]
    if is_csr(result):
        return [result.crow_indices(), result.col_indices(), result.values()]
    return [result]


def bits(value: Tensor) -> Tensor:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return value.contiguous().view(integers[value.element_size()])


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With layouts as they are; what is one argument twice stays one."""
    copies = {id(value): value.clone() if is_csr(value) else copy.deepcopy(value) for value in arguments}
    return tuple(copies[id(value)] for value in arguments)


def is_csr(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.sparse_csr


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments
    )


def doubled_options(options: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(options, doubled(tuple(options.values())), strict=True))


def same_bits(one: Any, other: Any) -> bool:
    """Whether two results are equal to the bit."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(bits(first), bits(second)) for first, second in pairs)


def placed(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """On another device with layouts as they are; what is one argument twice stays one."""
    moved = {id(value): _placed(value, device) for value in arguments}
    return tuple(moved[id(value)] for value in arguments)


def _placed(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor) or is_csr(value):
        return value.to(device) if isinstance(value, Tensor) else value
    storage = value.untyped_storage()
    flat = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage).to(device)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def on_cpu(result: Any) -> Any:
    """A result with all its tensors on the CPU."""
    if isinstance(result, Tensor):
        return result.cpu()
    if isinstance(result, tuple):
        return tuple(map(on_cpu, result))
    if isinstance(result, ops.Sinkhorn):
        parts = {field.name: on_cpu(getattr(result, field.name)) for field in dataclasses.fields(result)}
        return dataclasses.replace(result, **parts)
    return result

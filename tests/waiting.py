"""Finds where code waits for a GPU, also on a machine that has none."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import engine

PACKAGE = Path(engine.__file__).parent
METHODS = ("cpu", "tolist")
"""Copy to the host; where all is on the CPU, no operator shows it."""
LOOKS = {"_local_scalar_dense", "allclose", "equal", "lift_fresh"}
"""Bring a value to the host, or what the host has to the device."""
SIZES = {"bincount", "masked_select", "nonzero", "_unique", "_unique2", "unique_consecutive", "unique_dim"}
"""Give as much as hangs on the values, which the host has to know."""


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts what would wait for a GPU if all tensors in the block were there, by the function of the engine it is in.

    Gives a counter such as `{"ops/jaccard.py _distance_on_gpu": 1}`.
    """
    places: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, _counted(name, places)))
        stack.enter_context(_Operators(places))
        yield places


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside the block torch raises where it waits for the GPU that is there."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Operators(TorchDispatchMode):
    """Counts operators of torch, also those that the engine's own consist of."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if operator.namespace == "engine":
            with self:
                return OPDEFS[operator._schema.name]._init_fn(*arguments, **options)
        if _waits(operator, arguments, options):
            self.places[_place()] += 1
        return operator(*arguments, **options)


def _waits(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    name = operator._schema.name.removeprefix("aten::")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    if name == "repeat_interleave":
        return options.get("output_size") is None
    return name in LOOKS | SIZES


def _counted(name: str, places: Counter[str]) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        places[_place()] += 1
        return method(tensor, *arguments, **options)

    return counted


def _place() -> str:
    """The innermost function of the engine that is running."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "nothing of the engine"

"""Which code runs an operator.

An operator `x` lives in `engine/ops/x.py`. Its module holds `reference(...)`, the definition in plain torch, and
`cpu(...)` where csrc/x.cpp and `cuda(...)` where csrc/x.cu exists; `engine.kernels.x.x(...)` is its Triton form where
kernels/x.py exists. All take the arguments of the public function, already checked.

A loss against a memory bank is run by functions of another form, which return gradients with the losses (see
`_contrast.py`); its module holds the plain torch one as `rows(...)`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.ops import _cuda, _native
from engine.ops._precision import accumulation_dtype

ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
BACKENDS = ("cuda", "triton", "cpu", "reference")
FLOAT64 = ("cpu", "reference")
"""Those that compute in float64, too."""
_forced: ContextVar[str | None] = ContextVar("engine_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operators inside the block on one back end, or raise `RuntimeError` with the reason it cannot."""
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backends(op: str) -> dict[str, str | None]:
    """Per back end, None when `op` can run on it here, else the reason why not."""
    return {name: _find(op, name)[1] for name in BACKENDS}


def pick(op: str, *tensors: Tensor) -> Callable[..., Any]:
    """The function that runs `op` on its tensors, which are on one device.

    Raises:
        RuntimeError: a back end was asked for by `use_backend` or `ENGINE_BACKEND` and cannot run.
    """
    device = tensors[0].device.type
    names = ORDER.get(device, ("reference",))
    double = accumulation_dtype(*tensors) == torch.float64
    forced = _forced.get() or os.environ.get("ENGINE_BACKEND") or None
    if forced is not None:
        _check_name(forced)
        function, reason = _find(op, forced)
        if function is None:
            raise RuntimeError(f"back end {forced!r} of engine.ops.{op} was asked for but cannot run: {reason}")
        if forced != "reference" and forced not in names and not (forced == "triton" and interpreted()):
            raise RuntimeError(f"back end {forced!r} of engine.ops.{op} does not run on {device} tensors")
        if double and forced not in FLOAT64:
            raise RuntimeError(f"back end {forced!r} of engine.ops.{op} does not compute in float64")
        return function
    for name in names:
        if double and name not in FLOAT64:
            continue
        function, reason = _find(op, name)
        if function is not None:
            return function
        if exists(op, name):  # it should run here and does not: never silently slower
            _warn_once(op, name, str(reason))
    raise AssertionError("every operator has a reference")


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


@cache
def _warn_once(op: str, name: str, reason: str) -> None:
    warnings.warn(f"engine.ops.{op}: back end {name!r} cannot run ({reason}); using a slower one", stacklevel=3)


def _module(op: str) -> Any:
    try:
        return importlib.import_module(f"engine.ops.{op}")
    except ModuleNotFoundError as error:
        raise ValueError(f"op must be an operator of engine.ops, got {op!r}") from error


@cache
def exists(op: str, name: str) -> bool:
    """True when `op` has a form for back end `name`, whether or not it can run here."""
    if name == "triton":
        return importlib.util.find_spec(f"engine.kernels.{op}") is not None
    return hasattr(_module(op), name)


@cache
def _find(op: str, name: str) -> tuple[Callable[..., Any] | None, str | None]:
    """The function of one back end, or None and the reason."""
    module = _module(op)
    if not exists(op, name):
        return None, f"{op} has no {name} back end"
    if name == "triton":
        return _find_triton(op)
    if name == "reference":
        return getattr(module, "rows", module.reference), None
    try:
        if _native.stale():
            return None, "engine._C was built from other sources than csrc/ holds now; run: pip install -e ."
        if name == "cuda":
            _cuda.loader(op)
    except _cuda.Unavailable as reason:
        return None, str(reason)
    except ImportError as error:
        return None, f"engine._C is not built ({error}); install a C++17 compiler, then run: pip install -e ."
    return getattr(module, name), None


def interpreted() -> bool:
    """True where Triton runs its kernels in Python, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _find_triton(op: str) -> tuple[Callable[..., Any] | None, str | None]:
    if not torch.cuda.is_available() and not interpreted():
        return None, "no CUDA device"
    try:
        return getattr(importlib.import_module(f"engine.kernels.{op}"), op), None
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"

"""What every loss against a memory bank must do; the test file of each names its own inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine import ops
from engine.ops import _contrast, use_backend

TEMPERATURE = 0.05
Loss = Callable[..., Tensor]


def unit_rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64)).to(dtype)


def value_and_gradient(loss: Loss, features: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    features = features.detach().requires_grad_()
    value = loss(features, *rest, **options)
    (gradient,) = torch.autograd.grad(value.sum(), features)
    return value.detach(), gradient


def check_error_budget(name: str, dtype: torch.dtype, target: Tensor, bank_count: int, monkeypatch: Any) -> None:
    """Values and gradients err at most twice as much as the reference in the same dtype, in many blocks of rows."""
    monkeypatch.setattr(_contrast, "BLOCK_ENTRIES", 3 * bank_count)
    features = unit_rows(target.shape[0], 19, seed=1, dtype=dtype)
    bank = unit_rows(bank_count, 19, seed=2, dtype=dtype)
    reference = importlib.import_module(f"engine.ops.{name}").reference
    for reduction in ("mean", "sum", "none"):
        arguments = (target, TEMPERATURE)
        truth = value_and_gradient(reference, features.double(), bank.double(), *arguments, reduction=reduction)
        plain = value_and_gradient(reference, features, bank, *arguments, reduction=reduction)
        ours = value_and_gradient(getattr(ops, name), features, bank, *arguments, reduction=reduction)
        for actual, expected, exact in zip(ours, plain, truth, strict=True):
            assert actual.dtype == expected.dtype and actual.shape == exact.shape
            budget = 2 * (expected.double() - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (actual.double() - exact).abs().max() <= budget


def check_native(name: str, target: Tensor, bank_count: int, width: int, temperature: float = TEMPERATURE) -> None:
    """C++ stays in the error budget where rows, bank and width end within a block, and half banks are read as they are."""
    reference = importlib.import_module(f"engine.ops.{name}").reference
    features = unit_rows(target.shape[0], width, seed=1)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        bank = unit_rows(bank_count, width, seed=2, dtype=dtype)
        arguments = (target, temperature)
        truth = value_and_gradient(reference, features.double(), bank.double(), *arguments, reduction="none")
        plain = value_and_gradient(reference, features, bank, *arguments, reduction="none")
        with use_backend("cpu"):
            ours = value_and_gradient(getattr(ops, name), features, bank, *arguments, reduction="none")
            value = getattr(ops, name)(features, bank, *arguments, reduction="none")
        assert torch.equal(value, ours[0])  # without a gradient to compute
        for actual, expected, exact in zip(ours, plain, truth, strict=True):
            budget = 2 * (expected.double() - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (actual.double() - exact).abs().max() <= budget


def check_thread_counts(name: str, target: Tensor, bank_count: int) -> None:
    """The same bits for any number of threads, which also sets how many rows a block has."""
    features, bank = unit_rows(target.shape[0], 67, seed=1), unit_rows(bank_count, 67, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                arguments = (features, bank, target, TEMPERATURE)
                results.append(value_and_gradient(getattr(ops, name), *arguments, reduction="none"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def check_extremes(name: str, target: Tensor, bank: Tensor) -> None:
    """Logits far apart have a softmax; NaN and infinity are not hidden, and stay in their row."""
    loss = getattr(ops, name)
    reference = importlib.import_module(f"engine.ops.{name}").reference
    features = unit_rows(target.shape[0], bank.shape[1], seed=3)
    for scale in (1e-20, 1.0, 1e3):
        arguments = (bank.double(), target, TEMPERATURE)
        exact = value_and_gradient(reference, scale * features.double(), *arguments)
        for actual, expected in zip(
            value_and_gradient(loss, scale * features, bank, target, TEMPERATURE), exact, strict=True
        ):
            torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)
    for poison in (torch.nan, torch.inf):
        poisoned = features.clone()
        poisoned[1, 2] = poison
        value, gradient = value_and_gradient(loss, poisoned, bank, target, TEMPERATURE, reduction="none")
        clean, unpoisoned = value_and_gradient(loss, features, bank, target, TEMPERATURE, reduction="none")
        assert not value[1].isfinite() and not gradient[1].isfinite().all()
        others = torch.arange(len(features)) != 1
        assert torch.equal(value[others], clean[others]) and torch.equal(gradient[others], unpoisoned[others])
        spoiled = bank.clone()
        spoiled[4, 0] = poison
        assert not loss(features, spoiled, target, TEMPERATURE).isfinite()


def check_gradient(name: str, target: Tensor, bank: Tensor) -> None:
    features = unit_rows(target.shape[0], bank.shape[1], seed=3, dtype=torch.float64)
    arguments = features, bank, target
    loss = getattr(ops, name)
    for rows, *others in (arguments, [torch.stack([value, value.flip(0)]) for value in arguments]):
        for reduction in ("mean", "none"):
            function = partial(loss, reduction=reduction)
            assert torch.autograd.gradcheck(lambda f: function(f, *others, 0.5), [rows.clone().requires_grad_()])  # noqa: B023


def check_operator(name: str, target: Tensor, bank: Tensor) -> None:
    """The registered operator is what torch expects of one, and compiles without a graph break."""
    features = unit_rows(target.shape[0], bank.shape[1], seed=3)
    operator = getattr(torch.ops.engine, name).default
    loss = getattr(ops, name)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    problems = [value.expand(2, *value.shape) for value in (features, bank, target)]
    for rows, *others in ([features, bank, target], problems):
        torch.library.opcheck(operator, (rows.clone().requires_grad_(), *others, TEMPERATURE, True, "ieee"))
        torch.library.opcheck(operator, (rows, *others, TEMPERATURE, False, "fast"))
        eager = value_and_gradient(loss, rows, *others, TEMPERATURE)
        for actual, expected in zip(value_and_gradient(compiled, rows, *others, TEMPERATURE), eager, strict=True):
            torch.testing.assert_close(actual, expected)


def check_problems(name: str, target: Tensor, bank: Tensor, reductions: tuple[str, ...] = _contrast.REDUCTIONS) -> None:
    """Leading dimensions count problems, each with the loss and gradient that it has alone."""
    generator = torch.Generator().manual_seed(5)
    row_count, (bank_count, width) = target.shape[0], bank.shape
    features = unit_rows(6 * row_count, width, seed=6).view(3, 2, row_count, width)
    banks = torch.stack([bank[torch.randperm(bank_count, generator=generator)] for _ in range(6)])
    banks = banks.view(2, 3, *bank.shape).transpose(0, 1)  # no view as one matrix after the other
    targets = torch.stack([target.roll(shift, 0) for shift in range(6)]).unflatten(0, (3, 2))
    loss, reference = getattr(ops, name), importlib.import_module(f"engine.ops.{name}").reference

    def of(function: Loss, *place: int | slice, reduction: str) -> tuple[Tensor, Tensor]:
        parts = (value[place] for value in (features, banks, targets))
        return value_and_gradient(function, *parts, TEMPERATURE, reduction=reduction)

    for reduction in reductions:
        value, gradient = of(loss, reduction=reduction)
        assert value.shape == (3, 2) + (row_count,) * (reduction == "none") and gradient.shape == features.shape
        comparisons = [(value, gradient), of(reference, reduction=reduction)]
        for place in ((0, 1), (2, 0)):
            comparisons += [(value[place], gradient[place]), of(loss, *place, reduction=reduction)]
        for found, expected in zip(comparisons[::2], comparisons[1::2], strict=True):
            for actual, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=0, atol=3e-6 * (1 + float(wanted.abs().max())))
        for none in ((slice(0),), (slice(None), slice(0))):
            value, gradient = of(loss, *none, reduction=reduction)
            assert value.numel() == 0 and value.dim() == 2 + (reduction == "none") and gradient.numel() == 0


def check_autocast(name: str, target: Tensor, bank: Tensor) -> None:
    """Autocast changes nothing: products stay in float32, and half features meet a float32 bank."""
    loss = getattr(ops, name)
    for dtype in (torch.float32, torch.bfloat16):
        features = unit_rows(target.shape[0], bank.shape[1], seed=3, dtype=dtype)
        expected = value_and_gradient(loss, features.float(), bank, target, TEMPERATURE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, gradient = value_and_gradient(loss, features, bank, target, TEMPERATURE)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert torch.equal(value, expected[0])
        assert torch.equal(gradient, expected[1].to(dtype))


def check_refusals(name: str, target: Tensor, bank: Tensor) -> None:
    loss = getattr(ops, name)
    features = unit_rows(target.shape[0], bank.shape[1], seed=3).requires_grad_()
    with pytest.raises(TypeError, match=r"features must be a tensor \[\.\.\., B, D\], got list"):
        loss(features.tolist(), bank, target, TEMPERATURE)
    with pytest.raises(ValueError, match="bank must be of size"):
        loss(features, bank[:, 1:], target, TEMPERATURE)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got float 0.0"):
        loss(features, bank, target, 0.0)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got str 'avg'"):
        loss(features, bank, target, TEMPERATURE, reduction="avg")
    with pytest.raises(ValueError, match="of size .* in dimension 0"):
        loss(features[1:], bank, target, TEMPERATURE)
    with pytest.raises(ValueError, match=r"bank must be of leading dimensions \[3\] like features, got float32 \["):
        loss(features.expand(3, -1, -1), bank, target, TEMPERATURE)
    with pytest.raises(ValueError, match=r"must be of leading dimensions \[3\] like features"):
        loss(features.expand(3, -1, -1), bank.expand(3, -1, -1), target.expand(1, *target.shape), TEMPERATURE)
    with pytest.raises(ValueError, match="bank must be a constant"):
        loss(features, bank.clone().requires_grad_(), target, TEMPERATURE)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss(features, bank, target, TEMPERATURE), features, create_graph=True)
